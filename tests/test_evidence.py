"""Evidence packs: parts that name each other by digest, of any unlearned model; and examples of attacks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import pytest
from datasets import Dataset
from evaluations import whole
from helpers import CONFIGS, make_collator, make_tokenizer, prompted
from huggingface_hub import ModelCard
from small_evaluations import ATTACKS, learned, make_model, make_splits, measured

from spul.data.conversations import texts_of
from spul.evaluation.aggregation import in_words
from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.attacks import letter_case, with_prefix
from spul.evaluation.attacks.usual import JAILBREAKS, STAND_IN, TURN_UNIT, checked_attacks, usual_attacks
from spul.evaluation.evidence import evaluation_digest, verify_evidence, write_evidence
from spul.evaluation.examples import attack_examples
from spul.evaluation.report import hub_results
from spul.evaluation.results import Evaluation, join
from spul.evaluation.suite import Suite
from spul.gates import GatedUnlearner, NameGate
from spul.records import DataSummary, Ledger, LedgerEvent, fingerprint

SHA = "ab" * 32
FACTS = {
    "adapter": "forget-1",
    "weights_sha256": SHA,
    "base": "some/base",
    "base_fingerprint": "cd" * 32,
    "rows": {"train_forget": {"rows": 10, "digest": "ef" * 32}},
}


def evaluation() -> Evaluation:
    return dataclasses.replace(whole(), facts=FACTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("made")
    ledger = folder / "ledger.jsonl"
    Ledger(ledger).append(LedgerEvent("received", "1"))
    digest = write_evidence(evaluation(), folder / "pack", ledger, request="1")
    Ledger(ledger).append(LedgerEvent("served", "1"))
    return folder, digest


@pytest.fixture
def pack(made, tmp_path):
    """A copy to change."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "pack"


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_parts_name_each_other_and_the_ledger_names_all(made, pack):
    manifest = json.loads((pack / "manifest.json").read_text())
    files = {path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file()}
    assert files - {"manifest.json", "ledger-entry.jsonl"} == set(manifest["files"])
    assert {"README.md", "report.md", "report.html", "evaluation.json", "measurements.jsonl"} < files
    assert all(sha256(pack / name) == digest for name, digest in manifest["files"].items())
    for name in ("README.md", "report.md", "report.html"):
        text = (pack / name).read_text(encoding="utf-8")
        for digest in (sha256(pack / "evaluation.json"), sha256(pack / "measurements.jsonl"), SHA, "cd" * 32):
            assert digest in text, name
    entry = Ledger(pack.parent / "ledger.jsonl").entries()[1]
    assert entry.line == (pack / "ledger-entry.jsonl").read_text()
    assert (entry.event, entry.request) == ("evaluated", "1")
    assert made[1] == sha256(pack / "manifest.json") == evaluation_digest(pack) == entry.fields["evaluation"]
    state = Ledger(pack.parent / "ledger.jsonl").states()["1"]
    assert (state.adapter, state.prompt_sha256, state.rows) == ("forget-1", SHA, DataSummary(10, "ef" * 32))
    assert verify_evidence(pack) == verify_evidence(pack, pack.parent / "ledger.jsonl") == []


@pytest.mark.parametrize(
    "name", ["README.md", "report.html", "evaluation.json", "measurements.jsonl", "figures/splits.png"]
)
def test_a_changed_missing_or_added_part_is_named(pack, name):
    path = pack / name
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    assert verify_evidence(pack) == [f"{name} was changed"]
    path.unlink()
    assert verify_evidence(pack) == [f"{name} is missing"]
    path.write_bytes(before)
    (pack / "figures" / "more.png").touch()
    assert verify_evidence(pack) == ["figures/more.png is not named by manifest.json"]


def test_a_manifest_or_an_entry_that_was_changed_is_named(pack):
    ledger = pack.parent / "ledger.jsonl"
    (pack / "README.md").write_text("Better.")
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["files"]["README.md"] = sha256(pack / "README.md")
    (pack / "manifest.json").write_text(json.dumps(manifest))
    assert verify_evidence(pack) == ["manifest.json was changed: the entry in ledger-entry.jsonl has another SHA-256"]
    event = LedgerEvent("evaluated", "1", evaluation=sha256(pack / "manifest.json"))
    (pack / "ledger-entry.jsonl").write_text(Ledger(pack.parent / "forged.jsonl").append(event).line)
    assert verify_evidence(pack) == []  # all of it written anew: the ledger shows it
    (fault,) = verify_evidence(pack, ledger)
    assert fault.startswith("ledger.jsonl, no entry has the digest")
    (pack / "ledger-entry.jsonl").write_text("{}\n")
    assert verify_evidence(pack) == ["ledger-entry.jsonl is missing, or was changed"]
    for content, message in (({}, "has the format None; expected 1"), ({"format": 1}, "names no files")):
        (pack / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            verify_evidence(pack)
    (pack / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        verify_evidence(pack)


def test_the_evaluation_loads_from_the_pack_without_a_plain_digest_of_rows(pack):
    found = Evaluation.load(pack)
    assert list(map(str, found.metrics)) == list(map(str, whole().metrics))  # NaN is not NaN
    plain = [one.digest for one in whole().measurements]
    keyed = [one.digest for one in found.measurements]
    assert not set(plain) & set(keyed)
    assert [keyed.index(one) for one in keyed] == [plain.index(one) for one in plain]  # the same rows have the same


def test_the_card_has_the_results_in_the_hubs_form_and_answers_first(pack):
    text = (pack / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.model_name == "forget-1"
    assert card.data.eval_results == hub_results(whole())
    assert card.text.lstrip().startswith("# Evaluation of forget-1 on some/base\n\n## Is it forgotten?\n")


def test_a_pack_without_a_ledger_has_one_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    write_evidence(evaluation(), tmp_path / "pack")
    assert Ledger(tmp_path / "pack" / "ledger-entry.jsonl").verify() == []
    assert verify_evidence(tmp_path / "pack", tmp_path / "pack" / "ledger-entry.jsonl") == []
    (entry,) = Ledger(tmp_path / "pack" / "ledger-entry.jsonl").entries()
    assert entry.request == "forget-1"
    with pytest.raises(FileExistsError, match="is not empty; evidence is not written over"):
        write_evidence(evaluation(), tmp_path / "pack")


@pytest.mark.parametrize(
    ("folder", "ledger", "request_", "error", "message"),
    [
        ("file", None, "1", FileExistsError, "is a file"),
        ("pack", None, "", ValueError, "expected the name of a request"),
        ("pack", "ledger.jsonl", None, ValueError, r"ledger\.jsonl' is given without a request"),
        ("pack", "file", "1", ValueError, "is no entry of a ledger"),
        ("pack", "pack/../pack/ledger.jsonl", "1", ValueError, "expected it elsewhere"),
    ],
)
def test_evidence_that_cannot_be_noted_is_not_written(tmp_path, folder, ledger, request_, error, message):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("mine\n")
    (tmp_path / "pack").mkdir()
    with pytest.raises(error, match=message):
        write_evidence(evaluation(), tmp_path / folder, ledger and tmp_path / ledger, request_)
    assert not any((tmp_path / "pack").iterdir())
    assert (tmp_path / "file").read_text() == "mine\n"


def test_what_is_no_single_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="joined of several; write an evidence pack for each"):
        write_evidence(join([whole(), whole()]), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    with pytest.raises(FileNotFoundError, match=r"has neither manifest\.json nor evaluation\.json"):
        evaluation_digest(tmp_path)
    whole().save(tmp_path)
    assert evaluation_digest(tmp_path) == sha256(tmp_path / "evaluation.json")


@pytest.mark.parametrize("trainable", ["prompt_tuning", "whole"])
def test_a_pack_is_made_of_a_prompt_and_of_changed_weights_and_shows_no_row(tmp_path, trainable):
    pytest.importorskip("matplotlib")
    base = learned() if trainable == "whole" else None
    found = measured(make_model(trainable), "utility", "input attack", base=base)
    write_evidence(found, tmp_path / "pack")
    assert verify_evidence(tmp_path / "pack") == []
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert manifest["base_fingerprint"] == fingerprint(learned())
    assert len(manifest["model_digest"]) == 64
    card = (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")
    assert ("The weights were changed" in card) == (trainable == "whole")
    rows = [row["prompt"] for split in make_splits().values() for row in split]
    for path in (tmp_path / "pack").rglob("*.*"):
        text = path.read_bytes()
        assert not [row for row in rows if row.encode() in text], path.name


# ---- what attacks ask ----


def test_attacks_by_functions_of_ones_own_are_not_shown_since_they_may_hold_rows_in_any_form(tmp_path):
    pytest.importorskip("matplotlib")

    def with_row(some):
        return letter_case(with_prefix(some, "a secret play"), "upper")  # of none of the splits

    attacks = dataclasses.replace(ATTACKS, inputs={"with a row": with_row})
    found = measured(make_model("prompt_tuning"), "input attack", attacks=attacks)
    assert found.facts["attack_examples"] == {}
    assert "functions of your own may put rows of the data into" in found.skipped["examples of the input attacks"]
    write_evidence(found, tmp_path / "pack")
    assert not [path for path in (tmp_path / "pack").rglob("*.*") if b"secret play" in path.read_bytes().lower()]


def test_a_paraphrase_is_asked_of_the_rows_alone_and_only_attacks_that_are_made_are_shown():
    table = {text: f"say {text}" for name in ("test_forget", "test_retain") for text in make_splits()[name]["prompt"]}
    attacks = AttackSettings(paraphrase=table.__getitem__, only=("capitals", "paraphrase"))
    found = measured(make_model("prompt_tuning"), "input attack", attacks=attacks)
    assert {one.attack for one in found.measurements} == {"none", "capitals", "paraphrase"}
    assert found.facts["attack_examples"] == {"capitals": STAND_IN.upper()}
    assert "functions of your own" in found.skipped["example of the input attack 'paraphrase'"]


def talk(row):
    roles = {"prompt": "user", "completion": "assistant"}
    return {"text": row["text"], **{name: [{"role": role, "content": row[name]}] for name, role in roles.items()}}


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("text_field", [None, "text"])
def test_the_usual_attacks_are_all_shown_without_any_row(text_field, as_messages):
    splits = {name: rows.add_column("text", rows["prompt"][:]) for name, rows in make_splits().items()}
    if as_messages:
        splits = {name: Dataset.from_list(list(map(talk, rows))) for name, rows in splits.items()}
    none = dict.fromkeys(("base", "retrained", "reference", "unseen"))
    wording = {} if text_field is None else {"wording": {"film": "movie"}}
    settings = AttackSettings(turns=(1,), names=["Jane Doe"], **wording)
    collator = make_collator(text_field=text_field)
    suite = Suite(
        *(None, splits, collator), **none, neighbors={}, unrelated_texts=(), questions={}, question_format=None,
        attacks=settings, batch_size=1, max_new_tokens=1, seed=0,
    )  # fmt: skip
    filler = splits["test_retain"]
    made = checked_attacks(usual_attacks(text_field, filler, other_rows=filler, turns=(1,), wording=settings.wording))
    examples = attack_examples(suite, made)
    assert list(examples) == [in_words(*key, TURN_UNIT) for key in made]
    said = "user: " if as_messages else ""
    assert examples["jailbreak 1 before"].startswith(f"{said}{JAILBREAKS[0]}\n")
    assert examples["diluted, 1 turn"].endswith(f"{said}{STAND_IN}" if text_field is None else STAND_IN)
    assert examples["diluted, 1 turn"].count("assistant: answer ") == int(as_messages)
    assert ("mixed query, asked first" in examples) == (as_messages or text_field is not None)
    assert not [text for text in examples.values() if "Jane" in text]  # nor the names that are disguised
    rows = [text for split in splits.values() for one in split for text in texts_of(one["prompt"])]
    assert not [one for one in rows for text in examples.values() if one in text]


def test_facts_of_one_prompt_behind_a_gate_name_its_weights_and_those_of_several_none(tmp_path):
    prompt = prompted()
    prompt.save_pretrained(tmp_path / "forget-1")
    sha, name = prompt.spul_config.weights_sha256, prompt.spul_config.name
    gate = NameGate(["good 1"])
    facts = measured(GatedUnlearner(prompt, make_tokenizer(), {"default": gate}).eval(), "utility").facts
    assert facts["weights_sha256"] == sha == sha256(tmp_path / "forget-1" / "adapter_model.safetensors")
    assert facts["adapter"] == f"{name}, gate of default (names gate)"
    prompt.add_adapter("other", CONFIGS["prompt_tuning"](3))
    several = GatedUnlearner(prompt.eval(), make_tokenizer(), {"default": gate, "other": gate}).eval()
    assert measured(several, "utility").facts["weights_sha256"] is None
