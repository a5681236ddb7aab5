"""Names and digests in what an evaluation writes: report, card and results, of which no row can be guessed."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from typing import Any

import pytest
import torch
from helpers import arguments, layers_on, make_collator, make_dataset, make_tokenizer, rows
from small_evaluations import counted, learned, make_model, make_splits, measured, questions

from spul import (
    SoftPromptUnlearner,
    SpulConfig,
    UnlearningLayers,
    UnlearningLoss,
    UnlearningTrainer,
    fingerprint,
    forget_retain_dataset,
)
from spul.evaluation.report import add_to_card, write_report
from spul.evaluation.results import Evaluation
from spul.evaluation.settings import digests_of_model
from spul.gates import GatedUnlearner, NameGate
from spul.records.digests import (
    DataSummary,
    digest,
    digest_of_rows,
    is_summary_of,
    make_digest_key,
    sorted_digests,
)
from spul.records.spul_config import library_versions
from spul.training import unlearning_forward

pytestmark = pytest.mark.usefixtures("few_resamples")


def plain_digests(splits: Any) -> list[str]:
    """Digests of each split that need no secret, whole and cut."""
    found = [digest_of_rows(split) for split in splits.values()]
    prompts = [split for split in splits.values() if "prompt" in split.column_names]
    found += [hashlib.sha256(sorted_digests(split)).hexdigest() for split in prompts]
    return [*found, *(one[:16] for one in found)]


def test_report_and_evaluation_have_no_digest_by_which_rows_are_guessed(tmp_path):
    pytest.importorskip("matplotlib")
    options = {"neighbors": {"surname": rows("doe film", 5)}, "questions": {"forget": questions("a")}}
    found = measured(make_model("prompt_tuning"), "utility", **options, output_dir=tmp_path)
    write_report(found, tmp_path)
    sets = {**make_splits(), **options["neighbors"], **options["questions"]}
    for name in ("evaluation.json", "report.md", "report.html"):
        assert not [one for one in plain_digests(sets) if one in (tmp_path / name).read_text()], name
    assert any(one in (tmp_path / "settings.json").read_text() for one in plain_digests(sets))  # the owner's
    assert found.facts["rows"]["test_forget"] == {"rows": 7, "digest": None}


def test_evaluation_has_no_digest_by_which_names_of_a_gate_or_of_prompts_are_guessed(tmp_path):
    gated = GatedUnlearner(make_model("prompt_tuning").eval(), make_tokenizer(), {"default": NameGate(["Jane"])})
    measured(gated, "utility", output_dir=tmp_path / "gated")
    by_row = {name: ["default"] * len(split) for name, split in make_splits().items()}
    measured(make_model("prompt_tuning"), "utility", adapter_names=by_row, output_dir=tmp_path / "by_row")
    guesses = {"gated": [digests_of_model(gated)["settings"], gated.gates["default"].identity()]}
    guesses["by_row"] = [digest(names) for names in by_row.values()]
    for folder, some in guesses.items():
        assert not [one for one in some if one in (tmp_path / folder / "evaluation.json").read_text()], folder
    assert guesses["gated"][0] in (tmp_path / "gated" / "settings.json").read_text()  # the owner's


@pytest.mark.parametrize("trainable", ["prompt_tuning", "layers"])
def test_report_and_card_of_one_adapter_have_the_same_names_and_digests(tmp_path, trainable):
    pytest.importorskip("matplotlib")
    model, splits, key = make_model(trainable), make_splits(), make_digest_key(tmp_path / "key")
    model.get_base_model().name_or_path = "/home/jane/my-base"
    dataset = forget_retain_dataset(splits["train_forget"], splits["train_retain"])
    loss = UnlearningLoss() if trainable == "layers" else None
    UnlearningTrainer(model, arguments(tmp_path), make_collator(), dataset, loss=loss, digest_key=key)
    model.save_pretrained(str(tmp_path / "forget-jane"))
    load = {"layers": UnlearningLayers}.get(trainable, SoftPromptUnlearner).from_pretrained
    other_base = learned()
    other_base.name_or_path = "/home/jane/my-base"
    for one in (model, load(other_base, str(tmp_path / "forget-jane"))):
        found = measured(one, "utility", digest_key=key, output_dir=tmp_path / "evaluation")
        write_report(found, tmp_path / "evaluation")
        add_to_card(found, tmp_path / "forget-jane")
        record = SpulConfig.load(tmp_path / "forget-jane" / "spul_config.json")
        card = (tmp_path / "forget-jane" / "README.md").read_text()
        assert Evaluation.load(tmp_path / "evaluation").facts == found.facts
        for name in ("report.md", "report.html"):
            text = (tmp_path / "evaluation" / name).read_text()
            assert "/home/jane" not in text
            for told in ("forget-jane", "my-base", record.weights_sha256, library_versions()["spul"]):
                assert told in text
            assert datetime.now(timezone.utc).strftime("%Y-%m") in text
            for told in (record.base_fingerprint, record.forget.digest, record.retain.digest):
                assert told in text
                assert told in card
    rows_of = {name: DataSummary(**one) for name, one in found.facts["rows"].items()}
    assert (rows_of["train_forget"], rows_of["train_retain"]) == (record.forget, record.retain)
    assert is_summary_of(rows_of["test_forget"], splits["test_forget"], key)


def test_another_key_is_no_other_evaluation(tmp_path, monkeypatch):
    first = measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path)
    done = counted(monkeypatch)
    again = measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path, digest_key=bytes(32))
    assert done == []
    assert again.measurements == first.measurements
    assert Evaluation.load(tmp_path).facts == again.facts != first.facts


def test_an_adapter_that_was_trained_since_it_was_saved_is_not_told_to_be_the_file(tmp_path):
    model = make_model("prompt_tuning")
    assert measured(model, "sampling").facts["weights_sha256"] is None
    model.save_pretrained(str(tmp_path))
    saved = measured(model, "sampling", "quantized").facts  # by way of another folder
    assert (saved["adapter"], saved["weights_sha256"]) == (tmp_path.name, model.spul_config.weights_sha256)
    assert measured(model, "sampling").facts == saved
    model.parameters_changed()
    assert measured(model, "sampling").facts["weights_sha256"] is None
    model.save_pretrained(str(tmp_path))
    batch = make_collator()([make_dataset(1, 1)[i] for i in range(2)])
    with torch.no_grad():
        model(**batch)
    assert measured(model, "sampling").facts["weights_sha256"] == model.spul_config.weights_sha256 is not None
    model(**batch).loss.backward()  # in a loop of the user's, before a step
    assert measured(model, "sampling").facts["weights_sha256"] is None
    layers = layers_on(learned())
    layers.save_pretrained(tmp_path / "layers")
    assert measured(layers, "sampling").facts["weights_sha256"] is not None
    unlearning_forward(layers, UnlearningLoss(), **batch).loss.backward()
    assert measured(layers, "sampling").facts["weights_sha256"] is None
    trainable = SoftPromptUnlearner.from_pretrained(learned(), str(tmp_path), is_trainable=True)
    assert measured(trainable, "sampling").facts["weights_sha256"] is None


def test_other_adapters_are_told_by_name_and_kind_and_a_whole_model_by_its_base():
    facts = [measured(make_model(one), "sampling", base=learned()).facts for one in ("lora", "whole")]
    assert [one["adapter"] for one in facts] == ["default (LORA)", None]
    assert facts[0]["base_fingerprint"] == facts[1]["base_fingerprint"] == fingerprint(learned())
