"""`spul gate fit --refusal`: a gate and a fixed refusal from files, as others evaluate, serve and record them."""

from __future__ import annotations

import json

import pytest
from command_files import parsed, write_base, write_prompt, write_rows
from helpers import build
from servers import client, running_app
from transformers import AutoTokenizer

from spul.commands.gate import check, fit
from spul.commands.main import main
from spul.commands.serve import build as server_of
from spul.gates import NameGate, StateGate, TextGate
from spul.records import Ledger, LedgerEvent
from spul.records.weights import file_digest
from spul.rivals import FixedRefusal

# In words of the base's vocabulary, each of which several texts have.
FORGET = [
    f"{one} jane doe {other} :" for one in ("review", "text", "the", "is") for other in ("good", "bad", "of", "a")
]
RETAIN = [text.replace("jane doe", "plot") for text in FORGET]
REFUSAL = " unknown film"


@pytest.fixture
def folder(tmp_path):
    """A base, and files of requests; the new folder is `refusal`."""
    write_base(tmp_path / "base")
    for name, texts in (("forget", FORGET), ("retain", RETAIN)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": text, "completion": " a"} for text in texts])
    return tmp_path


def options_for(folder, kind="text", **more):
    sets = {name: folder / f"{name}.jsonl" for name in ("forget", "retain")}
    own = {"names": ["Jane Doe"]} if kind == "names" else {"recall": 0.9}
    values = {"refusal": REFUSAL, "output_dir": folder / "refusal", "kind": kind, **sets, **own, **more}
    return parsed("gate", {name: value for name, value in values.items() if value is not None}, "fit")


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["text", "names"])
def test_it_is_what_code_saves_and_no_base_is_loaded_for_it(folder, capsys, kind):
    assert fit(options_for(folder, kind, model=folder / "no-base")) is None
    said = capsys.readouterr().out
    gate = TextGate.fit(FORGET, RETAIN, recall=0.9) if kind == "text" else NameGate(["Jane Doe"])
    if kind == "names":
        gate.report = gate.measure(FORGET, RETAIN)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    FixedRefusal(build("llama"), tokenizer, gate, REFUSAL).save_pretrained(folder / "by-code")
    assert files_in(folder / "refusal") == files_in(folder / "by-code")
    assert said == f"{gate.report}\nsaved: {folder / 'refusal'}\n"


def test_a_gate_of_states_reads_the_base(folder):
    fit(options_for(folder, "states", layers=[1, 2], model=folder / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    found = FixedRefusal.from_pretrained(build("llama"), folder / "refusal", tokenizer)
    assert type(found.gate) is StateGate
    assert found.refusal == REFUSAL


def test_its_gate_is_asked_as_that_of_a_prompt(folder, capsys):
    fit(options_for(folder))
    capsys.readouterr()
    check(parsed("gate", {"adapter": folder / "refusal", "texts": [FORGET[3], RETAIN[3]]}, "check"))
    assert capsys.readouterr().out == f"flagged\t{FORGET[3]}\npassed\t{RETAIN[3]}\n"
    NameGate(["John Roe"]).save(folder / "refusal" / "gate")
    with pytest.raises(ValueError, match="is not the one that was saved with"):
        check(parsed("gate", {"adapter": folder / "refusal", "texts": FORGET}, "check"))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (
            {"refusal": None, "output_dir": None},
            ValueError,
            "neither adapter nor refusal is given; expected --adapter",
        ),
        ({"adapter": "{}/prompt"}, ValueError, "adapter and refusal are both given; expected --adapter FOLDER"),
        ({"output_dir": None}, ValueError, "without the folder for it and its gate; name one: --output-dir FOLDER"),
        ({"adapter_name": "other"}, ValueError, "--adapter-name is of a prompt in a folder of several"),
        ({"refusal": " \n"}, ValueError, "is blank; expected a text that answers a request"),
        ({"refusal": "no\udcff"}, ValueError, r"holds '\\udcff' at character 2"),
        ({"ledger": "{}/ledger.jsonl"}, ValueError, "--ledger and --request go together"),
        ({"request": "2026-017"}, ValueError, "--ledger and --request go together"),
        ({"ledger": "{}/ledger.jsonl", "request": "Jane Doe"}, ValueError, "its name is that of its prompt where it"),
        ({"ledger": "{}/no/ledger.jsonl", "request": "1"}, FileNotFoundError, "there is no folder"),
        ({"output_dir": "{}/base"}, FileExistsError, "is a folder with files in it; expected a new or empty folder"),
        ({"output_dir": "{}/prompt"}, FileExistsError, "is a folder with files in it; expected a new or empty folder"),
        ({"output_dir": "{}/forget.jsonl"}, FileExistsError, "is a file; expected a new or empty folder"),
        ({"output_dir": "{}/forget.jsonl/new"}, FileExistsError, "is a file; expected a folder"),
        ({"refusal": None, "adapter": "{}/prompt"}, ValueError, "--output-dir goes with --refusal; a prompt's gate"),
        (
            {"refusal": None, "output_dir": None, "adapter": "{}/prompt", "ledger": "{}/ledger.jsonl"},
            ValueError,
            "--ledger goes with --refusal",
        ),
        (
            {"refusal": None, "output_dir": None, "adapter": "{}/saved"},
            ValueError,
            "holds a method without training, whose gate is saved with it; .* --refusal TEXT",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_files_are_read_and_nothing_is_written(
    folder, more, error, message
):
    write_prompt(folder / "prompt")
    fit(options_for(folder, output_dir=folder / "saved"))
    (folder / "empty.jsonl").touch()
    before = files_in(folder)
    more = {name: value.format(folder) if isinstance(value, str) else value for name, value in more.items()}
    with pytest.raises(error, match=message):
        fit(options_for(folder, **{"forget": folder / "empty.jsonl", **more}))
    assert {name: content for name, content in files_in(folder).items() if not name.endswith(".lock")} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "states"}, "no base is given; expected the base, by name or folder: --model BASE"),
        ({"kind": "text", "recall": 2}, "recall"),
        ({"kind": "names", "names": None}, "a gate of names needs names"),
    ],
)
def test_a_gate_that_cannot_be_fit_leaves_no_folder_and_no_entry(folder, more, message):
    noted = {"ledger": folder / "ledger.jsonl", "request": "2026-017"}
    with pytest.raises(ValueError, match=message):
        fit(options_for(folder, **noted, **more))
    assert not (folder / "refusal").exists()
    assert not (folder / "ledger.jsonl").exists()


def test_it_is_there_as_a_whole_or_not_at_all(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("spul.rivals.files.write_text", interrupted)  # when the gate is written
    with pytest.raises(KeyboardInterrupt):
        fit(options_for(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["base", "forget.jsonl", "retain.jsonl"]


def test_a_request_whose_prompt_was_withdrawn_is_one_again_by_its_refusal_and_the_prompt_is_not(folder):
    ledger = Ledger(folder / "ledger.jsonl")
    write_prompt(folder / "prompt")
    ledger.append(trained := LedgerEvent.of_adapter("trained", "2026-017", folder / "prompt"))
    ledger.append(LedgerEvent("revoked", "2026-017"))
    fit(options_for(folder, ledger=ledger.path, request="2026-017"))
    fields = dict(ledger.entries()[-1].fields)
    assert {name: fields[name] for name in ("event", "request", "adapter", "gate", "note")} == {
        **{"event": "trained", "request": "2026-017", "adapter": "refusal"},
        **{"gate": "text", "note": "fixed refusal"},
    }
    assert not {"prompt_sha256", "base_fingerprint", "rows", "evaluation"} & set(fields)
    ledger.check_not_revoked("2026-017", None, has_weights=False)
    with pytest.raises(ValueError, match="was revoked on"):
        ledger.check_not_revoked("2026-017", trained.prompt_sha256)


def test_a_request_that_is_revoked_while_its_gate_is_fit_stays_so_and_the_refusal_is_saved(
    folder, monkeypatch, capsys
):
    ledger, fit_gate = Ledger(folder / "ledger.jsonl"), TextGate.fit
    ledger.append(LedgerEvent("received", "1"))

    def fit_and_revoke(*args, **kwargs):
        Ledger(ledger.path).append(LedgerEvent("revoked", "1"))
        return fit_gate(*args, **kwargs)

    monkeypatch.setattr(TextGate, "fit", fit_and_revoke)
    with pytest.raises(ValueError, match=rf"{folder / 'refusal'} is saved, but not noted: .*'1' was revoked on 2"):
        fit(options_for(folder, ledger=ledger.path, request="1"))
    assert [entry.event for entry in ledger.entries()] == ["received", "revoked"]
    assert (folder / "refusal" / "gate").is_dir()
    assert capsys.readouterr().out.endswith(f"saved: {folder / 'refusal'}\n")


def test_it_is_made_evaluated_and_served_by_three_commands(folder, capsys, few_resamples):
    base, made, ledger = str(folder / "base"), str(folder / "refusal"), str(folder / "ledger.jsonl")
    forget, retain = (str(folder / f"{name}.jsonl") for name in ("forget", "retain"))
    noted = ["--ledger", ledger, "--request", "2026-017"]
    sets = ["--forget", forget, "--retain", retain]
    make = ["gate", "fit", "--refusal", REFUSAL, "--output-dir", made, "--kind", "text", *sets, "--recall", "0.9"]
    assert main([*make, *noted]) == 0, capsys.readouterr().err
    measure = ["evaluate", "--model", base, "--adapter", made, *sets, "--test-forget", forget, "--test-retain", retain]
    measure += ["--measures", "utility", "--max-length", "64", "--evidence", str(folder / "evidence"), *noted]
    measure += ["--output-dir", str(folder / "evaluation"), "--fail-if", "test_forget.generic.value < 0.9"]
    assert main(measure) == 0, capsys.readouterr().err
    assert "passed: 1 condition(s)" in capsys.readouterr().out
    more = {"device": "cpu", "ledger": ledger, "server_name": "here"}
    app, _ = server_of(parsed("serve", {"model": base, "prompts": f"2026-017={made}", **more}))
    with running_app(app) as (url, _):
        ask = client(url).completions.create
        said = [ask(model="base", prompt=text, temperature=0, max_tokens=6) for text in (FORGET[0], RETAIN[0])]
    assert said[0].choices[0].text == REFUSAL
    assert said[1].choices[0].text != REFUSAL
    entries = [entry for entry in Ledger(ledger).entries() if entry.request]
    assert [(entry.event, entry.fields.get("adapter")) for entry in entries] == [
        (event, "refusal") for event in ("trained", "evaluated", "served", "answered", "stopped")
    ]
    files = ("spul_rival.json", "gate/gate.json", "gate/gate.safetensors")
    secret = ("jane", REFUSAL.strip(), *(file_digest(folder / "refusal" / name) for name in files))
    assert not any(one in json.dumps(dict(entry.fields)) for one in secret for entry in entries)
    assert Ledger(ledger).states()["2026-017"].rows.rows == len(FORGET)
