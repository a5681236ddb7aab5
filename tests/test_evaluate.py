"""One call for an evaluation: what it measures, skips and refuses."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, build, make_collator, rows
from peft import CPTConfig, LoraConfig, MultitaskPromptTuningConfig, PeftModel, get_peft_model
from small_evaluations import ATTACKS, INPUTS, assert_metrics, learned, make_model, make_splits, measured, questions

import spul
from spul.data import SENTIMENT, SPLITS, UnlearningData
from spul.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    generate_answers,
    probability,
    response_likelihoods,
    rouge_l,
)
from spul.evaluation.metrics.scoring import score_completions
from spul.evaluation.metrics.table import METRICS
from spul.evaluation.results import join

pytestmark = pytest.mark.usefixtures("few_resamples")


def test_free_form_answers_bring_their_measures_and_are_not_probed():
    words = ["film", "plot", "good", "text", "jane"]
    splits = {
        name: some.map(lambda row, i, name=name: {"completion": f" {words[i % 5]} {name[-3]} {i}"}, with_indices=True)
        for name, some in make_splits(train_retain=rows("film", 22)).items()
    }
    assert len({text for some in splits.values() for text in some["completion"]}) > 32
    assert all(len(set(splits[name]["completion"])) <= 32 for name in SPLITS)  # each for itself could be classes
    model, collator = make_model("prompt_tuning"), make_collator()
    found = measured(model, "utility", "linear probe", splits=splits, max_new_tokens=6)
    for split, some in splits.items():
        likelihoods = response_likelihoods(model, some, collator.encoder)
        rouge = rouge_l(generate_answers(model, some, collator.encoder, max_new_tokens=6), some["completion"])
        expected = {
            "probability": probability(likelihoods).mean(),
            "extraction_strength": extraction_strength(likelihoods).mean(),
            "exact_memorization": exact_memorization(likelihoods).mean(),
            **{name: values.mean() for name, values in rouge.items()},
            "loss": score_completions(model, some, collator)["loss"],
        }
        assert_metrics(found, expected, measure="utility", rows=split)
    assert "free-form" in found.skipped["linear probe"]
    assert {one.name for one in found.metrics} <= METRICS.keys()
    assert {one.measure for one in found.measurements} == {"utility"}


def test_few_different_answers_are_texts_where_that_is_said():
    found = measured(make_model("prompt_tuning"), "utility", "linear probe", free_form=True, max_new_tokens=2)
    assert found.metric("utility", "test_forget", "probability").value > 0
    assert "free-form" in found.skipped["linear probe"]
    assert not [one for one in measured(make_model("prompt_tuning"), "utility").metrics if one.name == "probability"]


def test_free_form_answers_have_as_many_tokens_as_tofus_unless_said():
    assert measured(learned(), "utility").settings["max_new_tokens"] == 200


# ---- what is skipped ----


def test_what_is_not_given_is_skipped_with_a_reason():
    splits = make_splits(test_forget=make_splits()["train_forget"].select(range(5)))
    found = measured(learned(), "kl", "membership", "neighbors", "unrelated text", "questions", splits=splits)
    assert found.measurements == found.metrics == []
    parts = {
        "detached": "give base=",
        "retrained": "give retrained=",
        "kl": "give base=",
        "membership": "5 of 5 rows of test_forget have the prompt of a row of train_forget; give unseen=",
        "neighbors": "give neighbors=",
        "unrelated text": "give unrelated_texts=",
        "questions": "give questions=",
    }
    assert found.skipped.keys() == parts.keys()
    for name, part in parts.items():
        assert part in found.skipped[name]
    unseen = rows("doe", 4)
    found = measured(learned(), "membership", splits=splits, unseen=unseen, retrained=learned(0.1))
    assert found.skipped.keys() == {"detached", "membership by the reference attack"}  # gradients are among ATTACKS
    assert [(one.rows, one.num_rows) for one in found.measurements] == [("train_forget", 11), ("unseen", 4)] * 2
    again = measured(learned(), "membership", unseen=splits["test_forget"])
    assert again.skipped["membership"].startswith("5 of 5 rows of unseen have the prompt of a row of train_forget")


def test_free_form_answers_that_both_sets_have_are_counted_and_not_shown():
    splits = make_splits(
        train_forget=Dataset.from_list([{"prompt": f"film {c} :", "completion": " good"} for c in "abc"])
    )
    answers = [" good", " jane", " good", " doe"]
    splits["test_forget"] = Dataset.from_list(
        [{"prompt": f"{one} {i} :", "completion": one} for i, one in enumerate(answers)]
    )
    found = measured(make_model("prompt_tuning"), "membership", splits=splits, free_form=True)
    reason = (
        "2 of 4 rows of test_forget have the completion of a row of train_forget; give unseen= without any of them"
    )
    assert found.skipped["membership"] == reason


@pytest.mark.parametrize("where", ["lm_head", "model.norm"])
def test_a_model_that_has_diverged_is_skipped_and_not_read_as_forgotten(where):
    model, names = make_model("whole"), ("utility", "kl", "relearning", "sampling", "linear probe")
    with torch.no_grad():
        model.get_submodule(where).weight[0] = torch.nan
    found = measured(model, *names, base=learned(), retrained=learned(0.1, 1))
    without = [*(f"utility {split}" for split in SPLITS), "kl train_retain", "kl test_retain"]
    without += ["sampling test_forget"] + [
        f"relearning train_forget unlearned {step}" for step in ("0 steps", "1 step", "3 steps")
    ]
    if where == "model.norm":  # before the hidden states that are probed
        without.append("linear probe train_forget")
    for measure in without:
        named = measure if "unlearned" in measure else f"{measure} unlearned"
        whys = [text for name, text in found.skipped.items() if name.startswith(named)]
        assert whys, named
        assert all("has diverged" in why for why in whys), named
    assert {one.measure for one in found.measurements if one.model == "retrained"} == set(names)
    assert {one.measure for one in found.measurements if one.model == "unlearned"} == (
        {"linear probe"} if where == "lm_head" else set()
    )


def test_of_texts_a_diverged_model_samples_none():
    model = make_model("whole")
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    found = measured(model, "sampling", free_form=True, max_new_tokens=2, base=learned())
    assert {one.model for one in found.measurements} == {"detached"}
    assert "has diverged" in found.skipped["sampling test_forget unlearned 7 tries"]


# ---- joined, and refused ----


def test_seeds_on_the_same_rows_are_joined_over_rows_and_seeds():
    asked = {"questions": {"forget": questions("a")}, "max_new_tokens": 2}
    seeds = [measured(make_model("prompt_tuning", i), "utility", "relearning", "questions", **asked) for i in (3, 4)]
    joined = join(seeds)
    for where in (
        {"measure": "utility", "rows": "test_retain", "name": "loss"},
        {"measure": "questions", "rows": "forget", "name": "probability"},
    ):
        number = joined.metric(**where)
        values = [one.metric(**where).value for one in seeds]
        assert number.value == pytest.approx(np.mean(values))
        assert (number.over, number.num_seeds) == ("rows and seeds", 2)
        assert number.low < number.value < number.high
        assert values[0] != values[1]
    where = {"measure": "relearning", "rows": "train_forget", "level": 3}
    assert joined.metric(**where, name="loss").over == "rows and seeds"
    elsewhere = measured(
        make_model("prompt_tuning", 4),
        "utility",
        "relearning",
        "questions",
        splits=make_splits(test_retain=rows("bad", 6)),
        questions={"forget": questions("b")},
        max_new_tokens=2,
    )
    mixed = join([seeds[0], elsewhere])
    assert mixed.metric("utility", "test_retain", "loss").over == "seeds"
    assert mixed.metric("questions", "forget", "probability").over == "seeds"
    assert mixed.metric("utility", "test_forget", "loss").over == "rows and seeds"


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, r"questions is a Dataset; expected a dict of some of forget", {"questions": questions("a")}),
        (ValueError, r"measures \['magic'\] are not known; expected some of utility, kl", {"measures": ["magic"]}),
        (
            ValueError,
            r"splits lack \['test_forget'\]",
            {"splits": {k: v for k, v in make_splits().items() if k != "test_forget"}},
        ),
        (
            ValueError,
            r"splits have \['unseen'\] beside .*no model was trained on as unseen=, rows near .* as neighbors=",
            {"splits": make_splits(unseen=rows("doe", 2))},
        ),
        (TypeError, "test_forget is a list; expected", {"splits": make_splits(test_forget=list(rows("doe", 2)))}),
        (TypeError, "near is a list; expected", {"neighbors": {"near": [{"prompt": "a", "completion": " b"}]}}),
        (
            ValueError,
            r"test_forget lacks the column\(s\) \['completion'\]",
            {"splits": make_splits(test_forget=rows("doe", 2).remove_columns("completion"))},
        ),
        (
            ValueError,
            r"2 row\(s\) of test_forget have is_forget=False; expected True",
            {"splits": make_splits(test_forget=rows("doe", 2).add_column("is_forget", [False] * 2))},
        ),
        (ValueError, "unseen is empty", {"unseen": rows("doe", 2).select([])}),
        (ValueError, "no generic_completions", {"collator": make_collator(generic_completions=None)}),
        (
            ValueError,
            "changes completions",
            {
                "measures": ["input attack"],
                "attacks": dataclasses.replace(ATTACKS, inputs={"cut": lambda some: some.select([0])}),
            },
        ),
    ],
)
def test_bad_input_raises_before_anything_is_written(tmp_path, error, match, change):
    given = {"splits": make_splits(), "collator": make_collator(), "measures": ["utility"]} | change
    with pytest.raises(error, match=match):
        spul.evaluate(learned(), **given, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["none"], "is called 'none'"),
        ([("none", 2)], "is called 'none'"),
        ([("a", 2), "a, 2 turns"], "read alike"),
        ([("a",)], "expected a name"),
        ([("a", -1)], "expected a name"),
        ([("a", 1.5)], "expected a name"),
        ([""], "expected a name"),
        ([3], "expected a name"),
    ],
)
def test_names_of_attacks_are_checked_before_anything_is_measured(keys, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(ATTACKS, inputs=dict.fromkeys(keys, INPUTS["capitals"]))


def test_a_sharded_model_raises_whichever_it_is():
    sharded = learned()
    next(sharded.parameters()).ds_id = sharded.ds_id = 0  # as DeepSpeed marks them, and modules that it gathers
    for name in ("base", "retrained", "reference"):
        with pytest.raises(ValueError, match=f"{name} is sharded"):
            measured(make_model("prompt_tuning"), "utility", **{name: sharded})


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_of_plain_peft_is_measured_but_for_the_soft_suffix_which_is_refused_first(tmp_path, prompt_type):
    make_model(prompt_type).save_pretrained(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(learned(), str(tmp_path / "adapter"))
    found = measured(plain, "utility")
    expected = measured(make_model(prompt_type), "utility").metric("utility", "test_forget", "loss").value
    assert found.metric("utility", "test_forget", "loss").value == pytest.approx(expected, rel=1e-4)
    for given in ({"model": plain}, {"model": learned(), "retrained": plain}):
        with pytest.raises(TypeError, match=rf"{list(given)[-1]} is under a prompt of PEFT.*leave 'soft suffix' out"):
            measured(given.pop("model"), "utility", "soft suffix", **given, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
    ],
)
def test_a_prompt_of_a_type_that_is_not_known_is_refused(config):
    plain = get_peft_model(learned(), config)
    with pytest.raises(TypeError, match="one of PROMPT_TUNING, P_TUNING, PREFIX_TUNING, CARTRIDGE, best loaded by"):
        measured(plain, "utility")
    with pytest.raises(TypeError, match="reference: the model is under a prompt of PEFT"):
        measured(make_model("layers"), "utility", reference=plain)


def test_that_rouge_is_missing_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    texts = [f" film {i}" for i in range(40)]
    free = {"train_retain": rows("film", 40).remove_columns("completion").add_column("completion", texts)}
    asked = {"questions": {"forget": questions("a")}}
    of_texts = {"splits": make_splits(**free)}
    for names, given in ((("utility",), of_texts), (("questions", "kl"), asked), (("relearning",), of_texts)):
        with pytest.raises(ImportError, match="pip install rouge-score"):
            measured(make_model("prompt_tuning"), *names, **given, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert measured(make_model("prompt_tuning"), "kl", splits=make_splits(**free)).measurements
    assert measured(make_model("prompt_tuning"), "utility").measurements


def test_unlearning_data_are_evaluated_in_their_format():
    texts = {
        split: {"text": some["prompt"], "label_text": ["positive"] * len(some)}
        for split, some in make_splits().items()
    }
    data = UnlearningData("films", {split: Dataset.from_dict(some) for split, some in texts.items()}, SENTIMENT)
    found = measured(learned(), "utility", splits=data)
    for split in SPLITS:
        assert_metrics(
            found, score_completions(learned(), data.rows(split), make_collator()), measure="utility", rows=split
        )


def test_rows_that_would_not_fit_the_model_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match=r"max_length=96 exceeds the 93 tokens .* at most 93"):
        measured(make_model("prompt_tuning"), "utility", collator=make_collator(max_length=96), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "base", "retrained", "reference"])
@pytest.mark.parametrize("folder", ["out/prompt", Path("out/prompt")], ids=["str", "Path"])
def test_the_name_of_a_folder_in_place_of_a_model_is_refused_with_how_to_load_it(name, folder):
    given = {"model": learned(), "splits": make_splits(), "collator": make_collator(), name: folder}
    with pytest.raises(TypeError, match=rf"{name} is a \w+, .*from_pretrained\(base, 'out/prompt'\)"):
        spul.evaluate(**given)


def test_what_is_no_model_no_splits_and_no_collator_is_refused():
    given = {"model": learned(), "splits": make_splits(), "collator": make_collator()}
    for name, value in (("model", None), ("splits", "folder"), ("collator", make_collator().tokenizer)):
        with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}"):
            spul.evaluate(**{**given, name: value})


def test_another_models_tokenizer_is_refused_before_anything_is_measured():
    base = build("llama")
    base.resize_token_embeddings(40)
    message = "the base has 40 input embeddings; expected the base's own tokenizer"
    with pytest.raises(ValueError, match=message):
        spul.evaluate(base, make_splits(), make_collator())
    few = dict.fromkeys(SPLITS, Dataset.from_list([{"prompt": "a b", "completion": " c"}]))  # bytes, below 40
    for others in ({"unseen": rows("doe", 2)}, {"neighbors": {"near": rows("doe", 2)}}):
        with pytest.raises(ValueError, match=message):
            spul.evaluate(base, few, make_collator(max_length=8), measures=(), **others)


@pytest.mark.parametrize("trains", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_another_models_tokenizer_is_refused_under_lora_on_the_embeddings(trains):
    base = build("llama")
    base.resize_token_embeddings(40)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **trains}))
    with pytest.raises(ValueError, match="the base has 40 input embeddings; expected the base's own tokenizer"):
        spul.evaluate(model, make_splits(), make_collator())


@pytest.mark.parametrize("score", [score_completions, lambda m, r, c: response_likelihoods(m, r, c.encoder)])
def test_the_name_of_a_folder_is_refused_by_single_measures_too(score):
    with pytest.raises(TypeError, match="model is a str, 'out/prompt'; expected a model in memory"):
        score("out/prompt", rows("doe", 2), make_collator())
