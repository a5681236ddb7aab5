"""Conversations in an evaluation, and rows in another format or behind a transform: measured as plain rows are."""

from __future__ import annotations

import dataclasses

import pytest
from datasets import Dataset
from gated_models import gated
from helpers import make_collator
from small_evaluations import ATTACKS, SEED, assert_metrics, make_model, make_splits, measured

from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.attacks import diluted, in_document, letter_case, mixed_query
from spul.evaluation.metrics.scoring import score_completions

pytestmark = pytest.mark.usefixtures("few_resamples")

DOCUMENT = "in a document of 9 words"


def make_talks():
    """The splits as conversations, and a collator for them."""
    collator = make_collator(max_length=90)
    collator.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def talk(row):
        roles = {"prompt": "user", "completion": "assistant"}
        return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}

    return {name: Dataset.from_list([talk(row) for row in some]) for name, some in make_splits().items()}, collator


def test_conversations_without_a_question_are_left_out_of_attacks_and_counted():
    splits, collator = make_talks()
    first, *others = splits["test_forget"]
    told = {**first, "prompt": [{**first["prompt"][0], "role": "system"}]}
    talks = {**splits, "test_forget": Dataset.from_list([told, *others])}
    settings = AttackSettings(only=["capitals", "diluted"], turns=(1,))
    model = make_model("prompt_tuning")
    found = measured(model, "utility", "input attack", splits=talks, collator=collator, attacks=settings)
    skipped = [name for name in found.skipped if name.startswith("input attack")]
    assert skipped == [f"input attack on 1 of {len(others) + 1} rows of test_forget"]
    asked = Dataset.from_list(others)
    for attack, rows_ in (("none", asked), ("capitals", letter_case(asked, "upper"))):
        expected = score_completions(model, rows_, collator)
        assert_metrics(found, expected, measure="input attack", rows="test_forget", attack=attack)
    expected = score_completions(model, talks["test_forget"], collator)
    assert_metrics(found, expected, measure="utility", rows="test_forget")


def test_attacks_on_conversations_of_which_none_has_a_question_are_skipped():
    splits, collator = make_talks()
    told = splits["test_forget"].map(lambda row: {"prompt": [{**row["prompt"][0], "role": "system"}]})
    settings = AttackSettings(only=["capitals"])
    talks = {**splits, "test_forget": told}
    found = measured(make_model("prompt_tuning"), "input attack", splits=talks, collator=collator, attacks=settings)
    assert 'no message of the role "user"' in found.skipped["input attack 'capitals' on test_forget"]


def test_conversations_are_attacked_in_their_question():
    talks, collator = make_talks()
    model = make_model("prompt_tuning")
    mixed = "mixed query, asked first"
    settings = AttackSettings(turns=(1,), only=["capitals", "diluted", mixed, DOCUMENT], document_words=(9,))
    with pytest.warns(UserWarning, match="in a document of 9 words"):  # which this model has little room for
        found = measured(model, "utility", "input attack", splits=talks, collator=collator, attacks=settings)
    assert not [name for name in found.skipped if name.startswith("input attack")]
    for split, some in talks.items():
        assert_metrics(found, score_completions(model, some, collator), measure="utility", rows=split)
    some, filler = talks["test_forget"], talks["test_retain"]
    ways = {
        ("capitals", None): letter_case(some, "upper"),
        ("diluted", 1): diluted(some, filler, 1, seed=SEED),
        (mixed, None): mixed_query(some, filler, seed=SEED),
        (DOCUMENT, None): in_document(some, 9, seed=SEED),
    }
    for (attack, level), attacked in ways.items():
        expected = score_completions(model, attacked, collator)
        which = {"measure": "input attack", "rows": "test_forget", "attack": attack, "level": level}
        assert_metrics(found, expected, **which)


def prompted():
    return make_model("prompt_tuning")


@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("make", "measures", "options"),
    [
        (prompted, ("utility", "input attack", "relearning", "sampling", "soft suffix"), {}),
        (prompted, ("utility", "sampling"), {"free_form": True, "max_new_tokens": 4}),
        (gated, ("utility",), {}),
    ],
    ids=["classes", "free form", "gated"],
)
def test_conversations_in_another_format_are_measured_as_plain_ones(form, make, measures, options):
    talks, collator = make_talks()
    settings = dataclasses.replace(ATTACKS, inputs=None, only=("capitals", "diluted"), turns=(1,))
    options = {"collator": collator, "attacks": settings, **options}
    found, plain = (
        measured(make(), *measures, splits=some, **options)
        for some in ({name: rows.with_format(form) for name, rows in talks.items()}, talks)
    )
    assert [one.key for one in found.measurements] == [one.key for one in plain.measurements]
    assert found.measurements == plain.measurements
    assert (found.settings, found.skipped) == (plain.settings, plain.skipped)


def test_rows_behind_a_transform_that_reads_another_column_are_measured_as_the_rows_that_it_makes():
    def asked(batch):
        return {**batch, "prompt": [s + p for s, p in zip(batch["before"], batch["prompt"], strict=True)]}

    splits = make_splits()
    some = splits["test_forget"].add_column("before", ["the film : "] * len(splits["test_forget"]))
    found, plain = (
        measured(make_model("prompt_tuning"), "utility", splits={**splits, "test_forget": one})
        for one in (some.with_transform(asked), some.map(asked, batched=True))
    )
    assert found.measurements == plain.measurements
