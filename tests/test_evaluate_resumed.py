"""An evaluation that is interrupted and gone on with, and one that several processes share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, make_collator, make_tokenizer, rows
from peft import LoraConfig, PeftModel, get_peft_model
from small_evaluations import ATTACKS, counted, learned, make_model, make_splits, measured, questions
from tokenizers import normalizers

from spul import (
    SoftPromptUnlearner,
    UnlearningLayers,
)
from spul.data import QUESTION_ANSWER
from spul.evaluation.results import Evaluation
from spul.evaluation.resuming import remove_progress
from spul.records.digests import (
    digest_of_tokenizer,
)

pytestmark = pytest.mark.usefixtures("few_resamples")


# ---- a folder, and going on ----


MEASURES = ("utility", "relearning", "neighbors", "sampling")
OTHERS = {"neighbors": {"surname": rows("doe film", 5)}}


def test_an_interrupted_evaluation_goes_on_and_gives_what_one_without_a_break_gives(tmp_path, monkeypatch):
    model = make_model("prompt_tuning")
    whole = measured(model, *MEASURES, **OTHERS, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        done = counted(patch, stop_after=9)
        with pytest.raises(KeyboardInterrupt):
            measured(model, *MEASURES, **OTHERS, output_dir=tmp_path / "broken")
        assert len(done) == 9
    path = tmp_path / "broken" / "progress-0.jsonl"
    kept = path.read_text()
    assert len(kept.splitlines()) == 9
    assert not (tmp_path / "broken" / "evaluation.json").exists()
    path.write_text(kept[:-20])  # killed while it wrote the ninth
    with monkeypatch.context() as patch:
        rest = counted(patch)
        found = measured(model, *MEASURES, **OTHERS, output_dir=tmp_path / "broken")
        assert rest[0] == done[8]
        assert len(rest) == len(set(done + rest)) - 8 == 13 - 8
    assert found.measurements == whole.measurements
    for name in ("evaluation.json", "measurements.jsonl", "settings.json"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert sorted(file.name for file in (tmp_path / "broken").iterdir()) == sorted(
        ["evaluation.json", "measurements.jsonl", "settings.json"]
    )
    with monkeypatch.context() as patch:
        assert counted(patch, stop_after=0) == []
        again = measured(make_model("prompt_tuning"), *MEASURES, **OTHERS, output_dir=tmp_path / "broken")
    assert again.measurements == whole.measurements
    assert Evaluation.load(tmp_path / "broken").settings == json.loads(json.dumps(whole.settings))


def test_what_two_processes_left_is_gone_on_with_but_for_a_task_cut_off_in_the_middle(tmp_path, monkeypatch):
    whole = measured(make_model("layers"), "relearning", "sampling", output_dir=tmp_path)
    (tmp_path / "evaluation.json").unlink()
    lines = (tmp_path / "measurements.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "measurements.jsonl").unlink()
    (tmp_path / "progress-0.jsonl").write_text("".join(lines[:2]) + lines[2][:30])  # relearning, of three
    (tmp_path / "progress-1.jsonl").write_text(lines[3])  # sampling, of two numbers of tries
    done = counted(monkeypatch)
    again = measured(make_model("layers"), "relearning", "sampling", output_dir=tmp_path)
    assert again.measurements == whole.measurements
    assert len(done) == 1 + 2


def lower_cased() -> Any:
    collator = make_collator()
    collator.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return collator


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_seed": 4}, "models"),
        ({"retrained": learned}, "models, names"),
        ({"splits": make_splits(test_forget=rows("doe", 6))}, "rows"),
        ({"splits": make_splits(test_forget=rows("doe", 7).select(range(6, -1, -1)))}, "rows"),
        ({"seed": 6}, "seed"),
        ({"attacks": dataclasses.replace(ATTACKS, num_rows=3)}, "attacks"),
        ({"attacks": dataclasses.replace(ATTACKS, inputs=None)}, "attacks"),
        ({"collator": make_collator(generic_completions=[" x"])}, "generic_completions"),
        ({"collator": make_collator(append_eos=True)}, "append_eos"),
        ({"unrelated_texts": ["good plot"]}, "unrelated_texts"),
        ({"questions": {"retain": questions("a")}}, "questions"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"measures": ("sampling", "kl")}, "measures"),
        ({"question_format": dataclasses.replace(QUESTION_ANSWER, template="film : {question}\n")}, "question_format"),
        ({"collator": lower_cased()}, "tokenizer"),
    ],
)
def test_another_evaluation_in_the_same_folder_raises_and_says_what_differs(tmp_path, change, named):
    measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    change = {name: value() if value is learned else value for name, value in change.items()}
    model, measures = make_model("prompt_tuning", change.pop("prompt_seed", 3)), change.pop("measures", ["sampling"])
    with pytest.raises(ValueError, match=rf"an evaluation that differs in {named}; give another output_dir"):
        measured(model, *measures, output_dir=tmp_path, **change)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("inputs", [None, ATTACKS.inputs])
def test_another_column_that_attacks_read_is_another_evaluation(tmp_path, inputs):
    """The text stands in the same prompts; attacks of the caller's may read any column."""
    attacks = dataclasses.replace(ATTACKS, inputs=inputs, only=() if inputs else ("capitals",))

    def evaluation(words: slice, folder: str) -> Evaluation:
        splits = {
            name: some.map(lambda row: {"text": " ".join(row["prompt"].split()[words])})
            for name, some in make_splits().items()
        }
        options = {"attacks": attacks, "collator": None if inputs else make_collator(text_field="text")}
        return measured(make_model("layers"), "input attack", splits=splits, output_dir=tmp_path / folder, **options)

    found = evaluation(slice(1, 3), "one")
    other = evaluation(slice(0, 2), "other")
    assert inputs or found.measurements != other.measurements  # so the one must not be given the other's
    with pytest.raises(ValueError, match="an evaluation that differs in rows; give another output_dir"):
        evaluation(slice(0, 2), "one")
    assert evaluation(slice(1, 3), "one").measurements == found.measurements


def test_another_paraphrase_of_a_question_beside_a_prompt_is_another_evaluation(tmp_path):
    def evaluation(answer: str) -> Evaluation:
        some = questions("a").map(lambda row: {"prompt": row["question"], "paraphrased_answer": answer})
        return measured(make_model("layers"), "questions", questions={"forget": some}, output_dir=tmp_path)

    found = evaluation("is good film")
    with pytest.raises(ValueError, match="an evaluation that differs in questions"):
        evaluation("is bad film")
    assert evaluation("is good film").measurements == found.measurements


def scaled(model: Any, alpha: float) -> Any:
    """The same LoRA as one that was made with another alpha: no weight differs."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=alpha, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(model, config)
    torch.nn.init.constant_(model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight, 0.3)
    return model


def two_prompts(active: str) -> Any:
    model = make_model("prompt_tuning")
    torch.manual_seed(9)
    model.add_adapter("second", CONFIGS["prompt_tuning"](3))
    model.set_adapter(active)
    return model


def two_loras(active: str) -> Any:
    model = make_model("lora")
    torch.manual_seed(9)
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 if "lora_B.second" in name else 0.0)
    model.set_adapter(active)
    return model


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: two_prompts("default"), lambda: two_prompts("second")),
        (lambda: two_loras("default"), lambda: two_loras("second")),
        (lambda: scaled(learned(), 1), lambda: scaled(learned(), 64)),
    ],
)
def test_models_that_differ_in_no_weight_are_told_apart_by_their_adapters(tmp_path, first, second):
    """Each for itself they give other numbers, so the one must not be given the other's."""
    found = measured(first(), "utility", output_dir=tmp_path / "first")
    other = measured(second(), "utility", output_dir=tmp_path / "second")
    weights = [one.settings["models"]["model"]["weights"] for one in (found, other)]
    assert weights[0] == weights[1]
    assert found.metric("utility", "test_forget", "loss").value != other.metric("utility", "test_forget", "loss").value
    with pytest.raises(ValueError, match="an evaluation that differs in models; give another output_dir"):
        measured(second(), "utility", output_dir=tmp_path / "first")
    assert measured(first(), "utility", output_dir=tmp_path / "first").measurements == found.measurements


@pytest.mark.parametrize("trainable", ["prompt_tuning", "layers", "lora"])
def test_a_model_whose_adapter_is_switched_off_is_another(tmp_path, trainable):
    model = make_model(trainable)
    measured(model, "sampling", base=learned(), output_dir=tmp_path)
    with model.disable_adapter(), pytest.raises(ValueError, match="differs in models"):
        measured(model, "sampling", base=learned(), output_dir=tmp_path)
    measured(model, "sampling", base=learned(), output_dir=tmp_path)


@pytest.mark.parametrize("trainable", ["prefix_tuning", "layers", "lora"])
def test_a_model_that_was_saved_and_loaded_is_the_same_evaluation(tmp_path, monkeypatch, trainable):
    """Whether it may learn, and where it lies, make no other model of it; nor does what the tokenizer did before."""
    model, collator = make_model(trainable), make_collator()
    collator.tokenizer.pad_token = "<pad>"
    found = measured(model, "sampling", output_dir=tmp_path / "out", collator=collator)
    model.save_pretrained(str(tmp_path / "adapter"))
    load = {"layers": UnlearningLayers, "lora": PeftModel}.get(trainable, SoftPromptUnlearner).from_pretrained
    collator.tokenizer(["the film", "a"], padding="max_length", truncation=True, max_length=8)
    done = counted(monkeypatch)
    again = measured(
        load(learned(), str(tmp_path / "adapter")), "sampling", output_dir=tmp_path / "out", collator=collator
    )
    assert again.measurements == found.measurements
    assert done == []


def rewritten(text: str) -> str:
    return text.replace("review", "film")


def rewritten_otherwise(text: str) -> str:
    return text.replace("review", "text")


class Rewriter:
    def __call__(self, text: str) -> str:
        return rewritten(text)


def test_a_paraphrase_is_known_by_its_name(tmp_path):
    def paraphrased(by: Any) -> Evaluation:
        attacks = dataclasses.replace(ATTACKS, inputs=None, paraphrase=by)
        return measured(make_model("layers"), "sampling", attacks=attacks, output_dir=tmp_path)

    first = paraphrased(rewritten)
    assert paraphrased(rewritten).measurements == first.measurements
    for other in (rewritten_otherwise, Rewriter(), None):
        with pytest.raises(ValueError, match="differs in attacks"):
            paraphrased(other)


def test_tokenizers_are_told_apart_by_all_that_makes_tokens():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<pad>"
    chat, rules, words = make_tokenizer(), make_tokenizer(), make_tokenizer()
    chat.chat_template = "{{ messages[0]['content'] }}"
    rules.backend_tokenizer.normalizer = normalizers.Lowercase()
    words.add_tokens(["film plot"])
    digests = [digest_of_tokenizer(one) for one in (make_tokenizer(), tokenizer, chat, rules, words)]
    assert len(set(digests)) == 5
    assert digest_of_tokenizer(make_tokenizer()) == digests[0]


# ---- files of others ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "settings.json' cannot be read"),
        ('{"seed": 3, "mod', "settings.json' cannot be read"),
        ("[]", "settings.json' holds a list; expected the fields of an evaluation"),
        ('{"theme": "dark"}', "an evaluation that differs in .*seed.*theme"),
        ("\udcff", "settings.json' cannot be read"),
    ],
    ids=["empty", "partial", "list", "foreign", "bytes"],
)
def test_settings_that_are_damaged_or_foreign_are_refused_and_left(tmp_path, content, message):
    file = tmp_path / "settings.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [
        (file.name, content.encode(errors="surrogateescape"))
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evaluation.json", "holds evaluation.json without the settings.json that spul.evaluate writes first"),
        ("measurements.jsonl", r"line 1 of .*measurements\.jsonl"),
        ("progress-1.jsonl", r"line 1 of .*progress-1\.jsonl"),
    ],
)
def test_a_folder_with_results_of_others_is_refused_and_left(tmp_path, name, message):
    (tmp_path / name).write_text('{"score": 1}\n')
    with pytest.raises(ValueError, match=message):
        measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [(name, '{"score": 1}\n')]


@pytest.mark.parametrize("name", ["measurements.jsonl", "progress-1.jsonl"])
def test_measurements_of_a_model_without_their_settings_are_refused_and_left(tmp_path, name):
    measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path / "first")
    lines = (tmp_path / "first" / "measurements.jsonl").read_text()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / name).write_text(lines)
    with pytest.raises(ValueError, match=f"holds {name} without the settings.json that spul.evaluate writes first"):
        measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path / "second")
    assert [(one.name, one.read_text()) for one in (tmp_path / "second").iterdir()] == [(name, lines)]


def test_progress_that_another_evaluation_has_removed_meanwhile_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "progress-0.jsonl"])
    remove_progress(tmp_path)
    assert not (tmp_path / "progress-0.jsonl").exists()


def test_results_that_are_not_of_the_settings_beside_them_are_refused_and_left(tmp_path):
    measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path)
    (tmp_path / "evaluation.json").write_text('{"score": 1}\n')
    with pytest.raises(ValueError, match=r"evaluation\.json in .* is not that of the settings.json beside it"):
        measured(make_model("prompt_tuning"), "sampling", output_dir=tmp_path)
    assert (tmp_path / "evaluation.json").read_text() == '{"score": 1}\n'
