"""Events of the ledger: what an adapter's record says, names of requests, and bad events, which are refused."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers import CONFIGS, prompted

from spul.gates import NameGate
from spul.prompts.names import NO_PROMPT
from spul.records import DataSummary, Ledger, LedgerEvent, SpulConfig
from spul.records.ledger_events import EVENTS
from spul.records.ledger_lines import next_line
from spul.rivals.refusal import write_refusal
from spul.serving.loading import check_name

SHA = "ab" * 32
ROWS = DataSummary(12, "cd" * 32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_a_request_that_an_earlier_version_named_oddly_can_be_revoked(path):
    path.write_bytes(next_line(None, {"event": "received", "request": "1\n"})[1])
    Ledger(path).append(LedgerEvent("revoked", "1\n"))
    assert Ledger(path).states()["1\n"].revoked is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("2026/017", "no name of 1 to 64 letters"),
        ("2026.017", "no name of 1 to 64 letters"),
        ("Jane Doe", "no name of 1 to 64 letters"),
        ("é", "no name of 1 to 64 letters"),
        ("x" * 65, "no name of 1 to 64 letters"),
        (NO_PROMPT, "the name of no prompt at all"),
        ("gate", "the folder of a prompt's gate; lengthen it, such as 'request-gate'"),
        *((name, "taken by PyTorch") for name in ("keys", "training", "type", "pop", "_modules", "__class__")),
    ],
)
def test_a_new_request_by_whose_name_no_prompt_can_be_served_is_refused_with_the_reason(path, name, reason):
    with pytest.raises(ValueError, match=reason):
        check_name(name)  # as the server does
    for event in ("received", "trained"):
        with pytest.raises(ValueError, match=f"its name is that of its prompt where it is served, and .*{reason}"):
            Ledger(path).append(LedgerEvent(event, name))
    assert not path.exists()
    path.write_bytes(next_line(None, {"event": "received", "request": name})[1])  # of an earlier version: it goes on
    Ledger(path).append(LedgerEvent("revoked", name))
    Ledger(path).append(LedgerEvent("received", name))
    assert Ledger(path).states()[name].revoked is None


@pytest.mark.parametrize("name", ["2026-017", "jane_doe", "prompt_encoder", "default", "-", "0", "x" * 64])
def test_a_prompt_can_be_added_and_served_by_every_other_name(path, name):
    Ledger(path).append(LedgerEvent("received", name))
    check_name(name)
    model = prompted(dtype=torch.float32)
    if name != "default":
        model.add_adapter(name, CONFIGS["prompt_tuning"]())
    assert name in model.prompt_encoder


def test_an_event_takes_what_an_adapters_record_says(tmp_path, path):
    folder = tmp_path / "forget-7"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    SpulConfig(forget=ROWS, base_fingerprint=SHA, weights_sha256=digest).save(folder)
    (folder / "gate").mkdir()
    (folder / "gate" / "gate.json").write_text('{"kind": "names"}')
    event = LedgerEvent.of_adapter("served", "7", folder, note="n")
    assert event == LedgerEvent("served", "7", ROWS, "forget-7", digest, SHA, "names", note="n")
    (folder / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="the weights are damaged"):
        LedgerEvent.of_adapter("served", "7", folder)
    with pytest.raises(FileNotFoundError, match=r"has no spul_config\.json"):
        LedgerEvent.of_adapter("served", "7", tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    for damaged in ("{}", '{"kind": null}', '{"kind": 3}'):
        (folder / "gate" / "gate.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"gate\.json: kind is .*; expected the name of a kind"):
            LedgerEvent.of_adapter("served", "7", folder)


def test_an_event_of_a_fixed_refusal_has_the_kind_of_its_gate_and_no_digest(tmp_path):
    folder = tmp_path / "refusal"
    write_refusal(folder, NameGate(["Jane Doe"]), " unknown")
    found = LedgerEvent.of_adapter("trained", "7", folder)
    assert found == LedgerEvent("trained", "7", adapter="refusal", gate="names", note="fixed refusal")
    found = LedgerEvent.of_adapter("served", "7", folder, note="mine", rows=ROWS)
    assert (found.note, found.rows, found.adapter) == ("mine", ROWS, "refusal")
    (folder / "spul_rival.json").write_text("{}")
    with pytest.raises(ValueError, match=r"spul_rival\.json: kind is None; expected the name of a method without tr"):
        LedgerEvent.of_adapter("trained", "7", folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"event": "deleted"}, f"event='deleted' is not known; expected one of {', '.join(EVENTS)}"),
        ({"event": "recovered"}, "is not known"),
        ({"request": " "}, "expected the name of a request"),
        ({"request": 7}, "expected the name of a request"),
        ({"request": None}, "expected the name of a request"),
        *(
            ({"request": name}, "a name of printable characters")
            for name in ("1\n2", "1\x1b[2J", "\udcff", " 1", "1 ")
        ),
        ({"event": "answered", "request": None, "adapter": "p"}, "expected the name of a request"),
        ({"answer": 3}, "answer=3; expected text"),
        ({"prompt_tokens": -1}, "prompt_tokens=-1; expected a number"),
        ({"completion_tokens": True}, "completion_tokens=True; expected a number"),
        ({"rows": {"rows": 1}}, "expected a DataSummary"),
        ({"rows": DataSummary(-1)}, "expected a DataSummary"),
        ({"rows": DataSummary(1, "short")}, "expected 64 hexadecimal digits"),
        ({"prompt_sha256": "AB" * 32}, "prompt_sha256='ABAB"),
        ({"base_fingerprint": 3}, "base_fingerprint=3; expected 64"),
        ({"evaluation": "x"}, "evaluation='x'; expected 64"),
        *(({"server": name}, f"server={name!r}; expected a name .* leave it out") for name in ("", " ", "gpu 1 ")),
        ({"gate": " "}, "gate=' '; expected the kind of a gate"),
        ({"note": b"x"}, "note=b'x'; expected text"),
        ({"at": "yesterday"}, "at='yesterday'; expected a time with its zone"),
        ({"at": "2026-03-01T09:30:00"}, "expected a time with its zone"),
        ({"at": "2999-01-01T00:00:00Z"}, "at='2999-01-01T00:00:00Z' is in the future"),
        ({"at": "9999-12-31T23:59:59Z"}, "is in the future"),
        ({"at": 5}, "expected a time with its zone"),
        ({"at": "0001-01-01T00:00:00+14:00"}, "expected a time with its zone"),
        ({"at": "9999-12-31T23:59:59-14:00"}, "expected a time with its zone"),
    ],
)
def test_bad_events_are_refused_and_nothing_is_written(path, fields, message):
    with pytest.raises(ValueError, match=message):
        Ledger(path).append(LedgerEvent(**{"event": "note", "request": "1"} | fields))
    assert not path.exists()


def test_bad_arguments_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match="is a folder; pass the path of a file"):
        Ledger(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Ledger(tmp_path / "no" / "ledger.jsonl").append(LedgerEvent("note", "1"))
    with pytest.raises(TypeError, match=r"event is a dict; expected LedgerEvent"):
        Ledger(path).append({"event": "note"})
    for read in (Ledger(path).verify, Ledger(path).entries, Ledger(path).head, Ledger(path).states):
        with pytest.raises(FileNotFoundError, match="there is no ledger"):
            read()
    path.touch()
    assert (Ledger(path).entries(), Ledger(path).verify()) == ([], [])
    with pytest.raises(ValueError, match="has no entry"):
        Ledger(path).head()
    with pytest.raises(ValueError, match="head='5f0c'; expected 64"):
        Ledger(path).verify("5f0c")
