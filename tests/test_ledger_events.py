"""Events of the ledger and the states of requests: what is served since when, revoked, answered; bad events."""

from __future__ import annotations

import hashlib

import pytest

from spul.records import DataSummary, Ledger, LedgerEvent, SpulConfig
from spul.records.ledger_events import EVENTS
from spul.records.ledger_lines import next_line

SHA = "ab" * 32
ROWS = DataSummary(12, "cd" * 32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_the_state_of_a_request_says_since_when_it_is_served_and_whether_it_was_revoked(path):
    ledger = Ledger(path)
    received = ledger.append(LedgerEvent("received", "1", rows=ROWS))
    trained = ledger.append(LedgerEvent("trained", "1", adapter="forget-1", prompt_sha256=SHA, base_fingerprint=SHA))
    ledger.append(LedgerEvent("received", "2"))
    ledger.append(LedgerEvent("served", "2", at="2026-03-01T10:30:00+01:00"))
    served = ledger.append(LedgerEvent("served", "1", gate="names"))
    again = ledger.append(LedgerEvent("served", "1"))  # as after a restart: it is still the same service
    one, two = ledger.states()["1"], ledger.states()["2"]
    assert (one.rows, one.adapter, one.prompt_sha256, one.base_fingerprint, one.gate) == (
        *(ROWS, "forget-1", SHA, SHA, "names"),
    )
    assert (one.served, two.served, one.revoked) == ([(served.time, None)], [("2026-03-01T09:30:00Z", None)], None)
    assert one.in_words()[-1] == f"now: served since {served.time}"
    stopped = ledger.append(LedgerEvent("stopped", "1", evaluation=SHA))
    assert ledger.states()["1"].in_words()[-1] == "now: no longer served"
    ledger.append(LedgerEvent("served", "1", at="2027-01-01T00:00:00Z"))
    answers = [
        ledger.append(LedgerEvent("answered", "1", at=f"2027-01-0{i}T00:00:00Z", note=note))
        for i, note in ((2, "once"), (3, "by hand"), (4, None))
    ]
    ledger.append(LedgerEvent("revoked", "1", at="2027-02-01T00:00:00Z", note="at their\nwish"))
    one = ledger.states()["1"]
    assert one.served == [(served.time, stopped.time), ("2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z")]
    assert (one.revoked, one.evaluation, one.served_again) == ("2027-02-01T00:00:00Z", SHA, False)
    assert one.in_words() == [
        f"rows: 12, HMAC-SHA256 {ROWS.digest}",
        *("adapter: forget-1", f"SHA-256 of the prompt: {SHA}", f"fingerprint of the base: {SHA}", "gate: names"),
        f"SHA-256 of the evaluation: {SHA}",
        *(f"{received.time} received", f"{trained.time} trained", f"{served.time} served", f"{again.time} served"),
        *(f"{stopped.time} stopped", "2027-01-01T00:00:00Z served"),
        f"{answers[0].at} to {answers[-1].at} answered 3 times: by hand",
        "2027-02-01T00:00:00Z revoked: at their wish",
        *("answers under it: 3", "now: revoked since 2027-02-01T00:00:00Z"),
    ]
    ledger.append(LedgerEvent("served", "1"))
    assert ledger.states()["1"].in_words()[-1] == "SERVED AFTER IT WAS REVOKED"


@pytest.mark.parametrize("event", ["received", "trained"])
def test_a_revoked_request_is_one_again_once_it_is_received_or_trained_anew(path, event):
    ledger, other = Ledger(path), "ef" * 32
    ledger.check_not_revoked("1", SHA)  # there is no file
    for name, sha in (("1", SHA), ("2", other), ("3", SHA)):
        ledger.append(LedgerEvent("received", name))
        ledger.append(LedgerEvent("served", name, prompt_sha256=sha))
    ledger.check_not_revoked("1", SHA)
    ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("answered", "1"))  # of a request that was under way
    for sha in (SHA, other, None):
        with pytest.raises(ValueError, match=r"'1' was revoked on 2.*--event received --request 1"):
            ledger.check_not_revoked("1", sha)
    with pytest.raises(ValueError, match=r"'1' was revoked .*, and 'renamed' has the same weights.*--request 1"):
        ledger.check_not_revoked("renamed", SHA)
    ledger.check_not_revoked("3", SHA)  # another request, which the ledger knows by the same weights
    ledger.check_not_revoked("2", other)
    ledger.check_not_revoked("new", None)
    ledger.append(LedgerEvent(event, "1"))
    ledger.check_not_revoked("1", SHA)
    ledger.append(LedgerEvent("served", "1"))
    state = ledger.states()["1"]
    assert not state.served_again
    assert (state.answered, state.answered_after) == (1, 1)
    assert "answers under it: 1, 1 of them after it was revoked" in state.in_words()
    path.write_bytes(path.read_bytes().replace(b'"request": "2"', b'"request": "4"'))
    with pytest.raises(ValueError, match=r"not a whole ledger: line 3: it was edited: .* not [0-9a-f]{12}\.$"):
        ledger.check_not_revoked("2")


def test_answers_are_counted_by_request_and_those_without_a_prompt_are_of_none(path):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("trained", "1", adapter="out"))
    assert ledger.states()["1"].in_words()[-1] == "now: never served"
    for i in range(3):
        ledger.append(LedgerEvent("answered", "1", adapter="out", answer=f"a-{i}", finish="stop", prompt_tokens=0))
    bare = ledger.append(LedgerEvent("answered", None, answer="a-3", finish="error 504", completion_tokens=7))
    assert (bare.request, bare.fields["completion_tokens"], "adapter" in bare.fields) == (None, 7, False)
    assert [(state.request, state.answered) for state in ledger.states().values()] == [("1", 3)]
    assert "answers under it: 3" in ledger.states()["1"].in_words()
    assert ledger.verify() == []


def test_a_ledger_of_earlier_versions_is_read_by_todays_names(path):
    """They wrote the adapter as `prompt`, and a server the request's name there."""
    event = LedgerEvent("trained", "1", prompt_sha256=SHA).to_dict()
    first, line = next_line(None, event | {"prompt": "forget-1"})
    second, other = next_line(first, {"event": "served", "request": "1", "prompt": "1"})
    path.write_bytes(line + other)
    ledger = Ledger(path)
    assert ledger.verify() == []
    assert (ledger.states()["1"].adapter, ledger.states()["1"].served) == ("forget-1", [(second.time, None)])
    ledger.append(LedgerEvent("stopped", "1", adapter="moved"))
    assert ledger.verify() == []
    assert ledger.states()["1"].adapter == "moved"
    path.write_bytes(line + next_line(first, {"event": "served", "request": "1", "prompt": 1})[1])
    assert [fault.line for fault in ledger.verify()] == [2]


def test_a_request_that_an_earlier_version_named_oddly_can_be_revoked(path):
    path.write_bytes(next_line(None, {"event": "received", "request": "1\n"})[1])
    Ledger(path).append(LedgerEvent("revoked", "1\n"))
    assert Ledger(path).states()["1\n"].revoked is not None


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
        ({"note": b"x"}, "note=b'x'; expected text"),
        ({"at": "yesterday"}, "at='yesterday'; expected a time with its zone"),
        ({"at": "2026-03-01T09:30:00"}, "expected a time with its zone"),
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
