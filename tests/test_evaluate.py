"""One call for an evaluation: what it measures, leaves out and refuses."""

from __future__ import annotations

import dataclasses
import importlib
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import CPTConfig, MultitaskPromptTuningConfig, PeftModel, get_peft_model
from test_suite import (
    ATTACKS,
    INPUTS,
    SEED,
    assert_numbers,
    assert_unchanged,
    halves,
    learned,
    make,
    make_splits,
    per_row,
    questions,
    snapshot,
)
from test_trainer import make_collator, rows
from test_unlearner import CONFIGS

import spul
import spul.evaluation.numbers as numbers
from spul import SoftPromptUnlearner, score_completions
from spul.data import SENTIMENT, SPLITS, UnlearningData
from spul.evaluation import (
    exact_memorisation,
    extraction_strength,
    generate_answers,
    probability,
    quantised,
    relearn,
    response_likelihoods,
    rouge_l,
    sampled_success,
    soft_suffix,
    with_prefix,
)
from spul.evaluation.results import Evaluation, join

evaluate_module = importlib.import_module("spul.evaluate")  # the name in spul is the function's


def measured(model: Any, *measures: str, splits: Any = None, **options: Any) -> Evaluation:
    """A small evaluation."""
    splits = make_splits() if splits is None else splits
    options = {"attacks": ATTACKS, "seed": SEED, "progress": False} | options
    collator = options.pop("collator", None) or make_collator()
    return spul.evaluate(model, splits, collator, measures=measures, **options)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals have tests of their own."""
    monkeypatch.setattr(numbers, "NUM_RESAMPLES", 20)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_that_was_loaded_to_be_used_is_relearned_and_then_frozen_again(tmp_path, prompt_type):
    trainable = make(prompt_type)
    trainable.save_pretrained(str(tmp_path))
    loaded = SoftPromptUnlearner.from_pretrained(learned(), str(tmp_path))
    before = snapshot(loaded)
    assert not any(before["requires_grad"].values())
    found = measured(loaded, "relearning")
    assert_unchanged(before, snapshot(loaded))
    losses = [found.number("relearning", "train_forget", "loss", variant=f"{i} steps").value for i in (0, 1, 3)]
    assert len(set(losses)) == 3
    if prompt_type != "p_tuning":  # of which only the vectors are loaded, not the network that makes them
        (few, others) = halves()
        records = relearn(trainable, few, others, make_collator(), 0.02, (1, 3), seed=SEED)
        assert losses == pytest.approx([record["loss"] for record in records], rel=1e-4)


def test_free_form_answers_bring_their_measures_and_are_not_probed():
    words = ["film", "plot", "good", "text", "jane"]
    splits = {
        name: some.map(lambda row, i, name=name: {"completion": f" {words[i % 5]} {name[-3]} {i}"}, with_indices=True)
        for name, some in make_splits(train_retain=rows("film", 22)).items()
    }
    assert len({text for some in splits.values() for text in some["completion"]}) > 32
    assert all(len(set(splits[name]["completion"])) <= 32 for name in SPLITS)  # each for itself could be classes
    model, collator = make("prompt_tuning"), make_collator()
    found = measured(model, "utility", "linear probe", splits=splits, max_new_tokens=6)
    for split, some in splits.items():
        likelihoods = response_likelihoods(model, some, collator)
        rouge = rouge_l(generate_answers(model, some, collator, max_new_tokens=6), some["completion"])
        expected = {
            "probability": probability(likelihoods).mean(),
            "extraction_strength": extraction_strength(likelihoods).mean(),
            "exact_memorisation": exact_memorisation(likelihoods).mean(),
            "rouge_l_recall": rouge.recall.mean(),
            "rouge_l_f1": rouge.f1.mean(),
            "loss": score_completions(model, some, collator)["loss"],
        }
        assert_numbers(found, expected, measure="utility", rows=split)
    assert "free-form" in found.left_out["linear probe"]
    assert {one.measure for one in found.measurements} == {"utility"}


def test_free_form_answers_have_as_many_tokens_as_tofus_unless_said():
    assert measured(learned(), "utility").settings["max_new_tokens"] == 200


def test_the_prompt_that_is_quantised_is_the_active_one():
    model = make("prompt_tuning")
    torch.manual_seed(8)
    model.add_adapter("second", CONFIGS["prompt_tuning"](3))
    model.set_adapter("second")
    alone = make("prompt_tuning")
    alone.prompt_encoder["default"].load_state_dict(model.prompt_encoder["second"].state_dict())
    one, other, first = (measured(some, "quantised") for some in (model, alone, make("prompt_tuning")))
    losses = [x.number("quantised", "test_forget", "loss", variant="4 bit").value for x in (one, other, first)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_attacks_take_the_same_drawn_rows_for_every_model():
    attacks = dataclasses.replace(ATTACKS, num_rows=4, tries=(2,))
    names = ("input attack", "sampling", "quantised")
    found = measured(make("prompt_tuning"), *names, attacks=attacks, retrained=learned(0.1, 1))
    drawn = make_splits()["test_forget"].select(sorted(random.Random(SEED).sample(range(7), 4)))
    success = sampled_success(learned(), drawn, make_collator(), 2, 0.7)
    np.testing.assert_allclose(per_row(found, "sampling", "test_forget", "detached", "2 tries")["success"], success)
    assert {one.num_rows for one in found.measurements} == {4}
    for measure in names:
        of = [x for x in found.measurements if (x.measure, x.rows) == (measure, "test_forget")]
        assert len({x.digest for x in of if x.variant not in INPUTS}) == 1


def test_the_usual_input_attacks_are_made_unless_others_are_given():
    attacks = dataclasses.replace(ATTACKS, inputs=None)
    found = measured(learned(), "input attack", attacks=attacks, collator=make_collator(max_length=96))
    variants = list(dict.fromkeys(one.variant for one in found.measurements))
    assert variants[:4] == ["none", "capitals", "random case", "spaces"]
    assert {"jailbreak 6 before", "jailbreak 6 after", "diluted, 1 turn", "diluted, 4 turns"} < set(variants)
    for split in ("test_forget", "test_retain"):  # whose prompts are in small letters
        assert "it changes no prompt" in found.left_out[f"input attack 'small letters' on {split}"]


def test_the_turns_that_dilute_are_those_asked_for_where_there_are_as_many_other_questions():
    attacks = dataclasses.replace(ATTACKS, inputs=None, turns=(2, 40))
    found = measured(learned(), "input attack", attacks=attacks, collator=make_collator(max_length=96))
    assert {one.variant for one in found.measurements if "diluted" in one.variant} == {"diluted, 2 turns"}
    assert "no more than 40 different questions" in found.left_out["input attack 'diluted, 40 turns'"]
    with pytest.raises(ValueError, match="turns"):
        dataclasses.replace(attacks, turns=(0,))
    with pytest.raises(ValueError, match="among them"):
        dataclasses.replace(ATTACKS, turns=(2,))


def test_halves_are_of_each_prompt_once_and_without_one_in_both():
    repeated = rows("jane", 9).select([0, 1, 2, 3, 3, 3, 4, 5, 0, 6])
    found = measured(make("layers"), "relearning", "soft suffix", splits=make_splits(train_forget=repeated))
    counts = {one.num_rows: one.variant for one in found.measurements}
    assert counts.keys() == {3, 4}  # of 7 prompts, 3 to learn and 4 to score
    assert counts[3] == "trained"


# ---- what is left out ----


def test_what_is_not_given_is_left_out_with_a_reason():
    splits = make_splits(test_forget=make_splits()["train_forget"].select(range(5)))
    found = measured(learned(), "kl", "membership", "neighbours", "unrelated text", "questions", splits=splits)
    assert found.measurements == found.numbers == []
    parts = {
        "detached": "give base=",
        "retrained": "give retrained=",
        "kl": "give base=",
        "membership": "test_forget holds what is in train_forget, too; give unseen=",
        "neighbours": "give neighbours=",
        "unrelated text": "give unrelated_texts=",
        "questions": "give questions=",
    }
    assert found.left_out.keys() == parts.keys()
    for name, part in parts.items():
        assert part in found.left_out[name]
    unseen = rows("doe", 4)
    found = measured(learned(), "membership", splits=splits, unseen=unseen, retrained=learned(0.1))
    assert found.left_out.keys() == {"detached", "membership by the reference attack"}  # gradients are among ATTACKS
    assert [(one.rows, one.num_rows) for one in found.measurements] == [("train_forget", 11), ("unseen", 4)] * 2
    again = measured(learned(), "membership", unseen=splits["test_forget"])
    assert again.left_out["membership"].startswith("unseen holds what is in train_forget")


def test_conversations_are_not_attacked_by_changes_of_text():
    collator = make_collator()
    collator.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def talk(row):
        return {name: [{"role": name, "content": text}] for name, text in row.items()}

    talks = {name: Dataset.from_list([talk(row) for row in some]) for name, some in make_splits().items()}
    model = make("prompt_tuning")
    found = measured(model, "utility", "input attack", splits=talks, collator=collator)
    assert "conversations" in found.left_out["input attack"]
    for split, some in talks.items():
        assert_numbers(found, score_completions(model, some, collator), measure="utility", rows=split)


def test_one_forget_prompt_is_too_few_to_attack_one_half_with_the_other():
    splits = make_splits(train_forget=rows("jane", 1))
    found = measured(make("layers"), "relearning", "soft suffix", "linear probe", splits=splits)
    assert found.measurements == []
    assert all("one prompt only" in found.left_out[name] for name in ("relearning", "soft suffix"))
    assert "linear probe" in found.left_out


def test_a_quantised_base_is_not_quantised_again(tmp_path):
    learned().save_pretrained(tmp_path)
    model = SoftPromptUnlearner(quantised(tmp_path, 4), CONFIGS["prompt_tuning"](3))
    found = measured(model, "quantised", "utility", retrained=learned(0.1))
    assert found.left_out == dict.fromkeys(("quantised, unlearned", "quantised, detached"), "it is quantised already")
    assert {one.model for one in found.measurements if one.measure == "quantised"} == {"retrained"}


@pytest.mark.parametrize("where", ["lm_head", "model.norm"])
def test_a_model_that_has_diverged_is_left_out_and_not_read_as_forgotten(where):
    model, names = make("whole"), ("utility", "relearning", "linear probe")
    with torch.no_grad():
        model.get_submodule(where).weight[0] = torch.nan
    found = measured(model, *names, base=learned(), retrained=learned(0.1, 1))
    without = [*(f"utility {split}" for split in SPLITS), "relearning train_forget"]
    if where == "model.norm":  # before the hidden states that are probed
        without.append("linear probe train_forget")
    for measure in without:
        (why,) = (text for name, text in found.left_out.items() if name.startswith(f"{measure} unlearned"))
        assert "has diverged" in why
    assert {one.measure for one in found.measurements if one.model == "retrained"} == set(names)
    assert {one.measure for one in found.measurements if one.model == "unlearned"} == (
        {"linear probe"} if where == "lm_head" else set()
    )


def test_relearning_at_a_rate_at_which_the_model_diverges_is_left_out():
    found = measured(make("prompt_tuning"), "relearning", attacks=dataclasses.replace(ATTACKS, relearn_lr=1e30))
    assert found.measurements == []
    assert "Lower the learning rate" in found.left_out["relearning train_forget unlearned 0 steps"]


# ---- joined, and refused ----


def test_seeds_on_the_same_rows_are_joined_over_rows_and_seeds():
    asked = {"questions": {"forget": questions("a")}, "max_new_tokens": 2}
    seeds = [measured(make("prompt_tuning", i), "utility", "relearning", "questions", **asked) for i in (3, 4)]
    joined = join(seeds)
    for where in (
        {"measure": "utility", "rows": "test_retain", "name": "loss"},
        {"measure": "questions", "rows": "forget", "name": "probability"},
    ):
        number = joined.number(**where)
        values = [one.number(**where).value for one in seeds]
        assert number.value == pytest.approx(np.mean(values))
        assert (number.over, number.num_seeds) == ("rows and seeds", 2)
        assert number.low < number.value < number.high
        assert values[0] != values[1]
    where = {"measure": "relearning", "rows": "train_forget", "variant": "3 steps"}
    assert joined.number(**where, name="loss").over == "rows and seeds"
    elsewhere = measured(
        make("prompt_tuning", 4),
        "utility",
        "relearning",
        "questions",
        splits=make_splits(test_retain=rows("bad", 6)),
        questions={"forget": questions("b")},
        max_new_tokens=2,
    )
    mixed = join([seeds[0], elsewhere])
    assert mixed.number("utility", "test_retain", "loss").over == "seeds"
    assert mixed.number("questions", "forget", "probability").over == "seeds"
    assert mixed.number("utility", "test_forget", "loss").over == "rows and seeds"


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"measures \['magic'\] are not known; expected some of utility, kl", {"measures": ["magic"]}),
        (
            ValueError,
            r"splits lack \['test_forget'\]",
            {"splits": {k: v for k, v in make_splits().items() if k != "test_forget"}},
        ),
        (TypeError, "rows are a list", {"splits": make_splits(test_forget=list(rows("doe", 2)))}),
        (TypeError, "rows are a list", {"neighbours": {"near": [{"prompt": "a", "completion": " b"}]}}),
        (
            ValueError,
            r"the rows of 'test_forget' lack \['completion'\]",
            {"splits": make_splits(test_forget=rows("doe", 2).remove_columns("completion"))},
        ),
        (ValueError, "no rows", {"unseen": rows("doe", 2).select([])}),
        (ValueError, "no generic_completions", {"collator": make_collator(generic_completions=None)}),
        (
            ValueError,
            "changes completions",
            {
                "measures": ["input attack"],
                "attacks": dataclasses.replace(ATTACKS, inputs={"cut": lambda some: some.select([0])}),
            },
        ),
        (
            ValueError,
            "is called 'none'",
            {
                "measures": ["input attack"],
                "attacks": dataclasses.replace(ATTACKS, inputs={"none": INPUTS["capitals"]}),
            },
        ),
    ],
)
def test_bad_input_raises_before_anything_is_written(tmp_path, error, match, change):
    given = {"splits": make_splits(), "collator": make_collator(), "measures": ["utility"]} | change
    with pytest.raises(error, match=match):
        spul.evaluate(learned(), **given, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sharded_model_raises_whichever_it_is():
    sharded = learned()
    next(sharded.parameters()).ds_id = 0  # as DeepSpeed marks them
    for name in ("base", "retrained", "reference"):
        with pytest.raises(ValueError, match=f"{name} is sharded"):
            measured(make("prompt_tuning"), "utility", **{name: sharded})


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_of_plain_peft_is_measured_but_for_the_soft_suffix_which_is_refused_first(tmp_path, prompt_type):
    make(prompt_type).save_pretrained(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(learned(), str(tmp_path / "adapter"))
    found = measured(plain, "utility")
    expected = measured(make(prompt_type), "utility").number("utility", "test_forget", "loss").value
    assert found.number("utility", "test_forget", "loss").value == pytest.approx(expected, rel=1e-4)
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
    with pytest.raises(TypeError, match="expected one of PROMPT_TUNING, P_TUNING, PREFIX_TUNING, best loaded by"):
        measured(plain, "utility")
    with pytest.raises(TypeError, match="reference is under a prompt of PEFT"):
        measured(make("layers"), "utility", reference=plain)


def test_that_rouge_is_missing_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    texts = [f" film {i}" for i in range(40)]
    free = {"train_retain": rows("film", 40).remove_columns("completion").add_column("completion", texts)}
    asked = {"questions": {"forget": questions("a")}}
    for names, given in ((("utility",), {"splits": make_splits(**free)}), (("questions", "kl"), asked)):
        with pytest.raises(ImportError, match="pip install rouge-score"):
            measured(make("prompt_tuning"), *names, **given, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert measured(make("prompt_tuning"), "kl", splits=make_splits(**free)).measurements
    assert measured(make("prompt_tuning"), "utility").measurements


def test_unlearning_data_are_evaluated_in_their_format():
    texts = {
        split: {"text": some["prompt"], "label_text": ["positive"] * len(some)}
        for split, some in make_splits().items()
    }
    data = UnlearningData("films", {split: Dataset.from_dict(some) for split, some in texts.items()}, SENTIMENT)
    found = measured(learned(), "utility", splits=data)
    for split in SPLITS:
        assert_numbers(
            found, score_completions(learned(), data.rows(split), make_collator()), measure="utility", rows=split
        )


def test_rows_that_would_not_fit_the_model_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match=r"max_length=96, and the model room for 93 tokens .* at most 93"):
        measured(make("prompt_tuning"), "utility", collator=make_collator(max_length=96), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_attacks_that_take_some_of_the_text_away_are_warned_of_and_that_take_most_left_out():
    inputs = {f"{num} more": lambda rows, num=num: with_prefix(rows, "the review " * num) for num in (8, 30)}
    attacks = dataclasses.replace(ATTACKS, inputs=inputs)
    with pytest.warns(UserWarning, match="'8 more' makes rows of test_forget lose"):
        found = measured(learned(), "input attack", attacks=attacks)
    assert {one.variant for one in found.measurements} == {"none", "8 more"}
    for split in ("test_forget", "test_retain"):
        assert "raise the collator's max_length" in found.left_out[f"input attack '30 more' on {split}"]


def test_the_soft_suffix_makes_room_for_itself():
    model = learned()
    full = rows("jane", 8).map(lambda row: {"prompt": "film " * 93 + row["prompt"]})
    room = model.config.max_position_embeddings
    attacks = dataclasses.replace(ATTACKS, suffix_tokens=4)
    found = measured(
        model,
        "soft suffix",
        attacks=attacks,
        splits=make_splits(train_forget=full),
        collator=make_collator(max_length=room),
    )
    shorter = make_collator(max_length=room - 4)
    few, others = halves(forget=full)
    expected = soft_suffix(model, few, others, shorter, 4, ATTACKS.suffix_steps, ATTACKS.suffix_lr, seed=SEED)
    assert per_row(found, "soft suffix", "train_forget", "unlearned", "after")["loss"] == pytest.approx(
        expected.after["loss"], rel=1e-4
    )


def test_what_is_known_of_free_form_answers_is_measured_in_attacks_too():
    words = ("film", "good", "bad", "plot", "jane", "text")
    answers = [f" {one} {other}" for one in words for other in words]
    splits = make_splits(train_forget=rows("jane", 36).map(lambda _, i: {"completion": answers[i]}, with_indices=True))
    found = measured(make("prompt_tuning"), "relearning", "soft suffix", splits=splits, max_new_tokens=2)
    for measure, variant in (("relearning", "3 steps"), ("soft suffix", "after")):
        number = found.number(measure, "train_forget", "probability", variant=variant)
        assert 0 < number.low < number.value < number.high < 1
        assert number.better == "low"
