"""One call for an evaluation: what it attacks, and how."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import small_evaluations
import torch
from datasets import Dataset
from helpers import CONFIGS, make_collator, rows, scored
from small_evaluations import (
    ATTACKS,
    INPUTS,
    SEED,
    assert_metrics,
    assert_unchanged,
    halves,
    learned,
    make_model,
    make_splits,
    measured,
    per_row,
    snapshot,
)

from spul import SoftPromptUnlearner
from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.attacks import (
    letters_apart,
    look_alikes,
    misspelt,
    mixed_query,
    quantized,
    relearn,
    sampled_success,
    soft_suffix,
    with_prefix,
)
from spul.evaluation.metrics.scoring import score_completions

pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_that_was_loaded_to_be_used_is_relearned_and_then_frozen_again(tmp_path, prompt_type):
    trainable = make_model(prompt_type)
    trainable.save_pretrained(str(tmp_path))
    loaded = SoftPromptUnlearner.from_pretrained(learned(), str(tmp_path))
    before = snapshot(loaded)
    assert not any(before["requires_grad"].values())
    found = measured(loaded, "relearning")
    assert_unchanged(before, snapshot(loaded))
    losses = [found.metric("relearning", "train_forget", "loss", level=i).value for i in (0, 1, 3)]
    assert len(set(losses)) == 3
    if prompt_type != "p_tuning":  # of which only the vectors are loaded, not the network that makes them
        (few, others) = halves()
        records = relearn(trainable, few, others, make_collator().encoder, scored, 0.02, (1, 3), seed=SEED)
        assert losses == pytest.approx([record["loss"] for record in records], rel=1e-4)


def test_the_prompt_that_is_quantized_is_the_active_one():
    model = make_model("prompt_tuning")
    torch.manual_seed(8)
    model.add_adapter("second", CONFIGS["prompt_tuning"](3))
    model.set_adapter("second")
    alone = make_model("prompt_tuning")
    alone.prompt_encoder["default"].load_state_dict(model.prompt_encoder["second"].state_dict())
    one, other, first = (measured(some, "quantized") for some in (model, alone, make_model("prompt_tuning")))
    losses = [x.metric("quantized", "test_forget", "loss", level=4).value for x in (one, other, first)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_attacks_take_the_same_drawn_rows_for_every_model():
    attacks = dataclasses.replace(ATTACKS, num_rows=4, tries=(2,))
    names = ("input attack", "sampling", "quantized")
    found = measured(make_model("prompt_tuning"), *names, attacks=attacks, retrained=learned(0.1, 1))
    drawn = make_splits()["test_forget"].select(sorted(random.Random(SEED).sample(range(7), 4)))
    success = sampled_success(learned(), drawn, make_collator().encoder, 2, 0.7)
    np.testing.assert_allclose(per_row(found, "sampling", "test_forget", "detached", level=2)["success"], success)
    assert {one.num_rows for one in found.measurements} == {4}
    for measure in names:
        of = [x for x in found.measurements if (x.measure, x.rows) == (measure, "test_forget")]
        assert len({x.digest for x in of if x.attack not in INPUTS}) == 1


def test_the_usual_input_attacks_are_made_unless_others_are_given():
    attacks = dataclasses.replace(ATTACKS, inputs=None)
    with pytest.warns(UserWarning, match="'jailbreak 5 before' makes rows of test_forget lose") as warned:
        found = measured(learned(), "input attack", attacks=attacks, collator=make_collator(max_length=96))
    assert {each.filename for each in warned} == {small_evaluations.__file__}
    attacks = list(dict.fromkeys((one.attack, one.level) for one in found.measurements))
    assert attacks[:4] == [(name, None) for name in ("none", "capitals", "random case", "spaces")]
    assert {("jailbreak 6 before", None), ("jailbreak 6 after", None), ("diluted", 1), ("diluted", 4)} < set(attacks)
    for split in ("test_forget", "test_retain"):  # whose prompts are in small letters
        assert "it changes no prompt" in found.skipped[f"input attack 'small letters' on {split}"]


def test_an_attack_on_the_input_notes_the_rows_that_it_changes():
    def shouted(rows):
        return rows.map(lambda row, i: row if i % 2 else {"prompt": row["prompt"].upper()}, with_indices=True)

    found = measured(learned(), "input attack", attacks=dataclasses.replace(ATTACKS, inputs={"shouted": shouted}))
    for split in ("test_forget", "test_retain"):
        scores = per_row(found, "input attack", split, "unlearned", "shouted")
        assert scores["changed"] == [float(i % 2 == 0) for i in range(len(scores["accuracy"]))]
        assert "changed" not in per_row(found, "input attack", split, "unlearned", "none")


def test_the_turns_that_dilute_are_those_asked_for_where_there_are_as_many_other_questions():
    attacks = dataclasses.replace(ATTACKS, inputs=None, turns=(2, 40))
    with pytest.warns(UserWarning, match="lose"):
        found = measured(learned(), "input attack", attacks=attacks, collator=make_collator(max_length=96))
    assert {one.level for one in found.measurements if one.attack == "diluted"} == {2}
    assert "no more than 40 different questions" in found.skipped["input attack 'diluted, 40 turns'"]
    chosen = measured(learned(), "input attack", attacks=dataclasses.replace(attacks, only=("capitals", "diluted")),
                      collator=make_collator(max_length=96))  # fmt: skip
    assert chosen.skipped["input attack 'diluted, 40 turns'"] == found.skipped["input attack 'diluted, 40 turns'"]
    chosen = measured(learned(), "input attack", attacks=dataclasses.replace(attacks, only=("capitals",)))
    assert "input attack 'diluted, 40 turns'" not in chosen.skipped
    with pytest.raises(ValueError, match="turns"):
        dataclasses.replace(attacks, turns=(0,))
    for name, value in {"turns": (2,), "names": ["Jane"], "document_words": (9,), "wording": {"a": "b"}}.items():
        with pytest.raises(ValueError, match=f"and {name} would have no effect"):
            dataclasses.replace(ATTACKS, **{name: value})
    assert dataclasses.replace(ATTACKS, names=[]).names == []


def with_text(splits):
    """The same rows with the column of the text that stands in their prompts."""
    return {name: some.map(lambda row: {"text": row["prompt"].removesuffix(" :")}) for name, some in splits.items()}


def test_new_surfaces_of_a_gate_are_attacked_with_names_and_the_rows_of_the_other_side(tmp_path):
    names = ["jane", "Film"]
    attacks = dataclasses.replace(ATTACKS, inputs=None, names=names, document_words=(4, 900), turns=(1,))
    splits = with_text(make_splits(test_forget=rows("jane doe", 7)))
    model, collator = learned(), make_collator(max_length=96, text_field="text")
    found = measured(model, "input attack", attacks=attacks, splits=splits, collator=collator, output_dir=tmp_path)
    forget, retain = splits["test_forget"], splits["test_retain"]
    for name, some, other in (("test_forget", forget, retain), ("test_retain", retain, forget)):
        expected = {
            "misspelt": misspelt(some, names, text_field="text", seed=SEED),
            "look-alike letters": look_alikes(some, names, "text"),
            "letters apart": letters_apart(some, names, " ", "text"),
            "letters hyphenated": letters_apart(some, names, "-", "text"),
            "mixed query, asked first": mixed_query(some, other, "text", "first", SEED),
            "mixed query, asked second": mixed_query(some, other, "text", "second", SEED),
        }
        for attack, changed in expected.items():
            scores = score_completions(model, changed, collator)
            assert_metrics(found, scores, measure="input attack", rows=name, attack=attack)
        assert "raise it" in found.skipped[f"input attack 'in a document of 900 words' on {name}"]
    assert "input attack on names" not in found.skipped
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert not any(name in text for name in names for text in files)
    settings = json.loads((tmp_path / "settings.json").read_text())["attacked_names"]
    assert settings.keys() == {"names", "digest"}
    assert found.settings["attacked_names"] == {"names": 2}
    other_names = dataclasses.replace(attacks, names=["jane"])
    with pytest.raises(ValueError, match="differs in attacked_names"):
        measured(model, "input attack", attacks=other_names, splits=splits, collator=collator, output_dir=tmp_path)


def test_a_mixed_query_without_another_text_is_skipped_on_that_side():
    one = rows("film", 1)
    forget = one.map(lambda row: {"prompt": "so " + row["prompt"]})
    attacks = dataclasses.replace(ATTACKS, inputs=None)
    found = measured(
        learned(),
        "input attack",
        attacks=attacks,
        splits=with_text(make_splits(test_forget=forget, test_retain=one)),
        collator=make_collator(max_length=96, text_field="text"),
    )
    mixed = {one.rows for one in found.measurements if "mixed" in one.attack}
    assert mixed == {"test_forget"}
    why = found.skipped["input attack 'mixed query, asked first' on test_retain"]
    assert why.startswith("row 0: every text of the other rows has the row's own in it")


@pytest.mark.parametrize(("role", "text_field"), [("system", None), ("user", "text")])
def test_reasons_why_conversations_are_not_attacked_show_none_of_them(role, text_field):
    collator = make_collator(max_length=96, text_field=text_field)
    collator.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {
        "prompt": [{"role": role, "content": "secret film"}],
        "completion": [{"role": "assistant", "content": "secret plot"}],
        "text": "secret jane",
    }
    splits = {name: Dataset.from_list([row] * 2) for name in make_splits()}
    attacks = AttackSettings(only=["capitals", "misspelt"], names=["secret"])
    found = measured(learned(), "input attack", splits=splits, attacks=attacks, collator=collator)
    whys = [why for name, why in found.skipped.items() if name.startswith("input attack")]
    assert len([why for why in whys if why.startswith("row 0: ")]) == 4
    assert not [why for why in whys if "secret" in why]


def test_attacks_that_lack_names_or_a_text_field_are_listed_as_skipped():
    attacks = dataclasses.replace(ATTACKS, inputs=None)
    with pytest.warns(UserWarning, match="lose"):
        found = measured(learned(), "input attack", attacks=attacks, collator=make_collator(max_length=96))
    assert "AttackSettings(names=...)" in found.skipped["input attack on names"]
    assert "text_field" in found.skipped["input attack by mixed queries and documents"]
    made = {one.attack for one in found.measurements}
    assert {"misspelt", "letters apart", "all jailbreaks before", "jailbreaks and a turn before"} < made
    assert not any("mixed" in attack or "document" in attack for attack in made)


@pytest.mark.parametrize("words", [(), (1,), (5, 5)])
def test_bad_lengths_of_documents_and_names_are_refused(words):
    with pytest.raises(ValueError, match=r"document_words=.* at least 2"):
        AttackSettings(document_words=words)
    with pytest.raises(TypeError, match="names is 'Jane'"):
        AttackSettings(names="Jane")
    with pytest.raises(ValueError, match="names holds ' '"):
        AttackSettings(names=["Jane", " "])


def test_halves_are_of_each_prompt_once_and_without_one_in_both():
    repeated = rows("jane", 9).select([0, 1, 2, 3, 3, 3, 4, 5, 0, 6])
    found = measured(make_model("layers"), "relearning", "soft suffix", splits=make_splits(train_forget=repeated))
    counts = {one.num_rows: one.attack for one in found.measurements}
    assert counts.keys() == {3, 4}  # of 7 prompts, 3 to learn and 4 to score
    assert counts[3] == "trained"


def test_one_forget_prompt_is_too_few_to_attack_one_half_with_the_other():
    splits = make_splits(train_forget=rows("jane", 1))
    found = measured(make_model("layers"), "relearning", "soft suffix", "linear probe", splits=splits)
    assert found.measurements == []
    assert all("one prompt only" in found.skipped[name] for name in ("relearning", "soft suffix"))
    assert "linear probe" in found.skipped


def test_a_quantized_base_is_not_quantized_again(tmp_path):
    learned().save_pretrained(tmp_path)
    model = SoftPromptUnlearner(quantized(tmp_path, 4), CONFIGS["prompt_tuning"](3))
    found = measured(model, "quantized", "utility", retrained=learned(0.1))
    assert found.skipped == dict.fromkeys(("quantized, unlearned", "quantized, detached"), "it is quantized already")
    assert {one.model for one in found.measurements if one.measure == "quantized"} == {"retrained"}


def test_relearning_at_a_rate_at_which_the_model_diverges_is_left_out():
    found = measured(make_model("prompt_tuning"), "relearning", attacks=dataclasses.replace(ATTACKS, relearn_lr=1e30))
    assert found.measurements == []
    assert "Lower the learning rate" in found.skipped["relearning train_forget unlearned 0 steps"]


def test_attacks_that_take_some_of_the_text_away_are_warned_of_and_that_take_most_left_out():
    inputs = {f"{num} more": lambda rows, num=num: with_prefix(rows, "the review " * num) for num in (8, 30)}
    attacks = dataclasses.replace(ATTACKS, inputs=inputs)
    collator = make_collator(max_length=33, text_field="text")
    splits = with_text(make_splits())
    with pytest.warns(UserWarning, match="'8 more' makes rows of test_forget lose"):
        found = measured(learned(), "input attack", attacks=attacks, collator=collator, splits=splits)
    assert {one.attack for one in found.measurements} == {"none", "8 more"}
    for split in ("test_forget", "test_retain"):
        assert "raise it, if the model has room" in found.skipped[f"input attack '30 more' on {split}"]


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
    expected, _ = soft_suffix(
        model, few, others, shorter.encoder, 4, ATTACKS.suffix_steps, ATTACKS.suffix_lr, seed=SEED
    )
    assert per_row(found, "soft suffix", "train_forget", "unlearned", "after")["loss"] == pytest.approx(
        expected["after"]["loss"], rel=1e-4
    )


def test_what_is_known_of_free_form_answers_is_measured_in_attacks_too():
    words = ("film", "good", "bad", "plot", "jane", "text")
    answers = [f" {one} {other}" for one in words for other in words]
    splits = make_splits(train_forget=rows("jane", 36).map(lambda _, i: {"completion": answers[i]}, with_indices=True))
    found = measured(make_model("prompt_tuning"), "relearning", "soft suffix", splits=splits, max_new_tokens=2)
    for measure, variant in (("relearning", {"level": 3}), ("soft suffix", {"attack": "after"})):
        one = found.metric(measure, "train_forget", "probability", **variant)
        assert 0 < one.low < one.value < one.high < 1
        assert one.better == "low"
