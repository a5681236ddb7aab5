"""The verdict of a report: forgotten, partly, not, nothing to forget, or none."""

from __future__ import annotations

import dataclasses

import pytest
from evaluations import measurement, membership, utility

from spul.evaluation.report.verdict import verdict
from spul.evaluation.results import Evaluation, join


def rows(right: int, num: int, model: str = "unlearned", split: str = "test_forget"):
    """A model that answers the first rows of a number right."""
    per_row = {"accuracy": [1.0] * right + [0.0] * (num - right)}
    return measurement("utility", split, model, per_row=per_row, num_rows=num)


def said(*measurements) -> str:
    return str(verdict(Evaluation({}, measurements, {})))


def probabilities(split: str = "test_forget", **values: float) -> list:
    """Free-form answers, of which each model gives all rows one probability."""
    return [
        measurement("utility", split, model, per_row={"probability": [value] * 10, "accuracy": [0.0] * 10})
        for model, value in values.items()
    ]


@pytest.mark.parametrize(
    ("right", "word"),
    [(0, "Forgotten"), (5, "Forgotten"), (6, "Partly forgotten"), (49, "Partly forgotten"), (50, "Not forgotten")],
)
def test_up_to_5_percent_is_forgotten_and_from_half_on_it_is_not(right, word):
    text = said(rows(right, 100), rows(100, 100, "detached"))
    assert text.startswith(f"{word}: {right} of 100 test forget rows are still answered right")


def test_rows_that_are_all_answered_are_not_forgotten():
    text = said(rows(6, 6), rows(6, 6, "detached"))
    assert text == "Not forgotten: 6 of 6 test forget rows are still answered right."


def test_rows_that_the_base_did_not_know_do_not_count():
    text = said(rows(60, 100), rows(60, 100, "detached"))
    assert text == "Not forgotten: 60 of 60 test forget rows that the base knew are still answered right."
    nothing = said(rows(3, 10), rows(0, 10, "detached"))
    assert nothing == "Nothing to forget: the base itself answered none of the 10 test forget rows."


def test_few_rows_are_said_to_leave_other_verdicts_possible():
    text = said(rows(0, 6), rows(6, 6, "detached"))
    # Wilson's interval of 0 of 6: its upper end is z^2 / (n + z^2) = 3.84 / 9.84.
    assert text == (
        "Forgotten: 0 of 6 test forget rows are still answered right. With so few rows, 0 to 39 % is possible (95 % "
        "interval)."
    )
    assert "few rows" not in said(rows(0, 100), rows(100, 100, "detached"))


@pytest.mark.parametrize(("right", "num", "word"), [(0, 3, "No verdict"), (0, 4, "Forgotten"), (1, 5, "No verdict")])
def test_an_interval_from_forgotten_to_not_forgotten_is_no_verdict(right, num, word):
    text = said(rows(right, num), rows(num, num, "detached"))
    assert text.startswith(f"{word}: {right} of {num} test forget rows")
    assert "With so few rows" in text


def test_free_form_answers_of_few_rows_that_differ_are_no_verdict():
    models = {"unlearned": [0.0, 0.0, 0.6], "detached": [0.9] * 3, "retrained": [0.2] * 3}
    found = [
        measurement("utility", "test_forget", model, per_row={"probability": values}, num_rows=3)
        for model, values in models.items()
    ]
    # 0 to 0.6 is possible; from 0.55 on, half way from the retrained model to the base, it is not forgotten.
    text = said(*found)
    assert text.startswith("No verdict: test forget probability is 0.2 [0, 0.6], the base's 0.9")
    assert text.endswith("; its interval reaches from forgotten to not forgotten.")


def test_rows_that_keep_as_much_and_tell_decide_before_those_too_few_to_tell():
    train = [rows(0, 100, split="train_forget"), rows(100, 100, "detached", "train_forget")]
    assert said(rows(0, 3), rows(3, 3, "detached"), *train).startswith("Forgotten: 0 of 100 train forget")
    assert said(rows(1, 5), rows(5, 5, "detached"), *train).startswith("No verdict: 1 of 5 test forget")


def test_the_same_rows_under_several_seeds_count_once_in_the_interval():
    one = Evaluation({}, [rows(0, 50), rows(50, 50, "detached")], {})
    text = str(verdict(join([one, one])))
    # Wilson's interval of 0 of 50, not of 100: its upper end is 3.84 / 53.84.
    assert text == (
        "Forgotten: 0 of 100 test forget rows of 2 seeds are still answered right. With so few rows, 0 to 7 % is "
        "possible (95 % interval)."
    )


def test_without_the_bases_answers_all_rows_count_and_it_is_said():
    text = said(rows(1, 100))
    assert text.startswith(
        "Forgotten: 1 of 100 test forget rows is still answered right; what the base knew of them was not measured."
    )


def test_the_forget_rows_that_keep_more_decide():
    train = [rows(80, 100, split="train_forget"), rows(100, 100, "detached", "train_forget")]
    assert said(rows(0, 100), rows(100, 100, "detached"), *train).startswith("Not forgotten: 80 of 100 train forget")
    assert said(*train).startswith("Not forgotten: 80 of 100 train forget")
    unknown = [rows(0, 100), rows(0, 100, "detached")]
    assert said(*unknown, *train).startswith("Not forgotten: 80 of 100 train forget")


def test_what_was_not_measured_has_no_verdict():
    assert verdict(Evaluation({}, membership(), {})) is None
    assert verdict(Evaluation({}, utility({"unlearned": {"test_retain": 9}}), {})) is None


@pytest.mark.parametrize(
    ("after", "word"),
    [(0.1, "Forgotten"), (0.23, "Forgotten"), (0.3, "Partly forgotten"), (0.7, "Not forgotten")],
)
def test_free_form_answers_are_judged_between_the_retrained_model_and_the_base(after, word):
    assert said(*probabilities(unlearned=after, detached=0.9, retrained=0.2)).startswith(f"{word}: test forget prob")


def test_free_form_answers_without_a_retrained_model_are_never_said_to_be_forgotten():
    assert said(*probabilities(unlearned=0.5, detached=0.9)).startswith(
        "Not forgotten: test forget probability is 0.5"
    )
    text = said(*probabilities(unlearned=0.01, detached=0.9))
    assert text.startswith("No verdict: test forget probability is 0.01")
    assert "Only a retrained model tells how low" in text
    alone = said(*probabilities(unlearned=0.01))
    assert alone == "No verdict: test forget probability is 0.01, but the base's was not measured."


def test_free_form_answers_that_the_base_knows_no_better_than_a_retrained_model_are_nothing_to_forget():
    text = said(*probabilities(unlearned=0.1, detached=0.2, retrained=0.2))
    assert text.startswith("Nothing to forget: test forget probability is 0.1, the base's 0.2, the retrained model's")


def test_a_verdict_that_is_told_goes_before_one_that_is_not():
    other = [dataclasses.replace(one, rows="train_forget") for one in probabilities(unlearned=0.8, detached=0.9)]
    text = said(*probabilities(unlearned=0.01, detached=0.9), *other)
    assert text.startswith("Not forgotten: train forget")
