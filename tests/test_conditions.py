"""Conditions on metrics: read, never run; met by ends of intervals; unknown names are errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
from evaluations import measurement, utility

from spul.evaluation.aggregation import NUM_RESAMPLES
from spul.evaluation.conditions import Condition, failures
from spul.evaluation.metrics.intervals import bootstrap_interval
from spul.evaluation.results import Evaluation, join


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    attacked = [
        measurement(
            "input attack",
            "test_forget",
            "unlearned",
            name,
            per_row={"accuracy": [1.0] * right + [0.0] * (10 - right), **({"changed": changed} if changed else {})},
        )
        for name, right, changed in (
            ("none", 9, None),
            ("capitals", 6, [1.0] * 10),
            ("disguised", 4, [1.0, 1.0, 1.0, 0.0] * 2 + [0.0] * 2),  # 3 of the 4 answered rows are changed
        )
    ]
    return Evaluation({}, utility() + attacked, {"relearning": "no time"})


def test_a_condition_is_read_in_parts_and_written_as_it_was():
    found = Condition.parse(" test_forget.accuracy.high>0.05 ")
    assert found == Condition("utility", "test_forget", "accuracy", "high", ">", 0.05)
    assert Condition.parse(str(found)) == found
    found = Condition.parse("input attack: test_forget.accuracy.low <= 1e-1")
    assert found == Condition("input attack", "test_forget", "accuracy", "low", "<=", 0.1)
    assert Condition.parse("input-attack: test_forget.accuracy.low <= 1e-1") == found  # as --measures takes it
    assert Condition.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("accuracy > 0.05", "cannot be read"),
        ("test_forget.accuracy.high", "cannot be read"),
        ("test_forget.accuracy.high == 0", "cannot be read"),
        ("test_forget.accuracy.high > 0 and 1", "cannot be read"),
        ("test_forget.accuracy.high > __import__('os')", "ends in no number"),
        ("test_forget.accuracy.high > much", "ends in no number"),
        ("test_forget.accuracy.high > nan", "expected a finite number"),
        ("test_forget.accuracy.high > 5", "> 5: accuracy is a number from 0 to 1, and 5 % is 0.05"),
        ("test_forget.accuracy.high > 1", "> 1: accuracy is a number from 0 to 1, and 1 % is 0.01"),
        ("test_retain.accuracy.low < 0", r"< 0: accuracy is a number from 0 to 1\.$"),
        ("test_forget.accuracy.high >= 0", r">= 0: accuracy is a number from 0 to 1\.$"),
        ("test_forget.accuracy.high <= 1", "<= 1: accuracy is a number from 0 to 1"),
        ("test_forget.loss.high < 0", "< 0: loss is a number from 0 to inf"),
        ("test_retain.accuracy.low < -0.1", r"accuracy is a number from 0 to 1\.$"),
        ("test_forget.accuracy.low > 101", r"accuracy is a number from 0 to 1\.$"),
        ("test_retain.loss.high < -1", "< -1: loss is a number from 0 to inf"),
        ("test_forget.accuracy.highest > 0", "'highest' is no end of an interval; expected one of low, value, high"),
        ("test_forget.accurcy.high > 0", "there is no metric 'accurcy'; expected such as accuracy"),
        ("usefulness: test_forget.accuracy.high > 0", "there is no measure 'usefulness'"),
    ],
)
def test_what_is_no_condition_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        Condition.parse(text)


@pytest.mark.parametrize("comparison", [">", ">=", "<", "<="])
@pytest.mark.parametrize("end", ["low", "value", "high"])
def test_a_condition_is_met_where_the_plain_comparison_holds(evaluation, end, comparison):
    one = evaluation.metric("utility", "test_forget", "accuracy")
    for number in (0.0, one.low, one.value, one.high, 1.0):
        found = Condition("utility", "test_forget", "accuracy", end, comparison, number).met_by(evaluation)
        assert bool(found) is eval(f"{getattr(one, end)!r} {comparison} {number!r}")


def test_of_several_attacks_those_that_meet_it_are_named_and_rows_without_attack_do_not_count(evaluation):
    condition = Condition.parse("input attack: test_forget.accuracy.value > 0.55")
    assert [one.attack for one in condition.met_by(evaluation)] == ["capitals"]
    (line,) = failures(evaluation, [condition])
    assert line.startswith("input attack: test_forget.accuracy.value > 0.55: test_forget.accuracy (capitals) is 0.6 [")


def test_of_an_attack_on_the_input_the_rows_that_it_changes_count(evaluation):
    (one,) = Condition.parse("input attack: test_forget.accuracy.value < 0.55").met_by(evaluation)
    assert (one.attack, one.value, one.num_rows) == ("disguised", 0.5, 6)  # of all rows it is 0.4
    plain = bootstrap_interval([1.0] * 3 + [0.0] * 3, num_resamples=NUM_RESAMPLES)
    assert (one.low, one.high) == (plain.low, plain.high)
    (line,) = failures(evaluation, [Condition.parse("input attack: test_forget.accuracy.value < 0.55")])
    assert line.endswith("], over the 6 of 10 rows that it changes")


@pytest.mark.parametrize(
    ("measure", "others", "counted"),
    [
        ("relearning", [("", 0)], ("", 4)),
        ("soft suffix", [("before", None), ("trained", None)], ("after", None)),
    ],
)
def test_values_before_an_attack_and_on_rows_that_it_learned_from_do_not_count(measure, others, counted):
    found = [
        measurement(measure, "train_forget", "unlearned", attack, level=level, per_row={"accuracy": [1.0] * 10})
        for attack, level in [*others, counted]
    ]
    (one,) = Condition.parse(f"{measure}: train_forget.accuracy.value > 0").met_by(Evaluation({}, found, {}))
    assert (one.attack, one.level) == counted


@pytest.mark.parametrize(("name", "level"), [("before", None), ("trained", None), ("mine", 0)])
def test_attacks_on_the_input_count_by_whatever_name_and_level(name, level):
    per_row = {"accuracy": [1.0] * 10, "changed": [1.0] * 10}
    one = measurement("input attack", "test_forget", "unlearned", name, level=level, per_row=per_row)
    (met,) = Condition.parse("input attack: test_forget.accuracy.value > 0").met_by(Evaluation({}, [one], {}))
    assert (met.attack, met.level) == (name, level)


def test_an_attack_of_one_row_is_compared_by_wilsons_interval_and_does_not_hide_others():
    def attack(name, **per_row):
        return measurement("input attack", "test_forget", "unlearned", name, per_row=per_row)

    one_row = attack("one row", accuracy=[0.0] * 10, probability=[0.2] * 10, changed=[1.0] + [0.0] * 9)
    every = attack("every row", accuracy=[1.0] * 10, probability=[0.9] * 5 + [0.8] * 5, changed=[1.0] * 10)
    found = Evaluation({}, [one_row, every], {})
    by_accuracy = Condition.parse("input attack: test_forget.accuracy.high > 0.5").met_by(found)
    assert [(one.attack, one.num_rows) for one in by_accuracy] == [("every row", 10), ("one row", 1)]
    assert by_accuracy[1].high == pytest.approx(0.793, abs=1e-3)
    (met,) = Condition.parse("input attack: test_forget.probability.high > 0.5").met_by(found)
    assert met.attack == "every row"
    with pytest.raises(ValueError, match=r"\(one row\) has no high, only the value 0\.2; compare that"):
        Condition.parse("input attack: test_forget.probability.high > 0.95").met_by(found)


def test_a_seed_in_which_an_attack_changes_no_row_does_not_hide_the_others():
    def seed(changed):
        per_row = {"accuracy": [1.0] * 10, "changed": changed}
        return Evaluation({}, [measurement("input attack", "test_forget", "unlearned", "noise", per_row=per_row)], {})

    for seeds in ([0.0, 1.0], [1.0, 0.0]):
        both = join([seed([1.0 - share] + [share] * 9) if share else seed([0.0] * 10) for share in seeds])
        (one,) = Condition.parse("input attack: test_forget.accuracy.value > 0").met_by(both)
        assert (one.num_seeds, one.num_rows, one.note) == (1, 9, "over the 9 of 10 rows that it changes")


def test_seeds_whose_attacks_change_other_rows_are_joined(evaluation):
    def seed(changed):
        per_row = {"accuracy": [1.0] * 5 + [0.0] * 5, "changed": changed}
        return Evaluation({}, [measurement("input attack", "test_forget", "unlearned", "noise", per_row=per_row)], {})

    both = join([seed([1.0] * 5 + [0.0] * 5), seed([1.0] * 10)])
    (one,) = Condition.parse("input attack: test_forget.accuracy.value > 0").met_by(both)
    assert (one.value, one.num_seeds) == (0.75, 2)


def test_a_metric_that_some_seeds_lack_leaves_conditions_on_others_known():
    def seed(**more):
        found = []
        for attack, scores in (("noise", more), ("capitals", {"past_gate": [0.0] * 10})):
            per_row = {"accuracy": [0.0] * 10, "changed": [1.0] * 10, **scores}
            found.append(measurement("input attack", "test_forget", "unlearned", attack, per_row=per_row))
        return Evaluation({}, found, {})

    both = join([seed(past_gate=[0.0] * 10), seed()])
    assert Condition.parse("input attack: test_forget.accuracy.value > 0.5").met_by(both) == []
    with pytest.raises(ValueError, match=r"past_gate of input .* noise has no value \(of 1 of 2 seeds only\)"):
        Condition.parse("input attack: test_forget.past_gate.value > 0.5").met_by(both)


def test_attacks_that_change_no_row_or_noted_no_changes_are_errors_and_not_passed():
    def evaluation(**scores):
        per_row = {"accuracy": [1.0] * 4, **scores}
        return Evaluation({}, [measurement("input attack", "test_forget", "unlearned", "noise", per_row=per_row)], {})

    condition = Condition.parse("input attack: test_forget.accuracy.value > 0.5")
    with pytest.raises(ValueError, match="it has nothing of it"):
        condition.met_by(evaluation(changed=[0.0] * 4))
    with pytest.raises(ValueError, match="was measured by an earlier version of spul"):
        condition.met_by(evaluation())


def test_an_attack_under_which_the_model_has_diverged_is_an_error_and_not_passed(evaluation):
    skipped = {"input attack test_forget unlearned diluted, 4 turns": "it has diverged"}
    diverged = dataclasses.replace(evaluation, skipped=skipped)
    with pytest.raises(ValueError, match=r"unlearned diluted, 4 turns has no value \(it has diverged\)"):
        Condition.parse("input attack: test_forget.accuracy.value > 0.7").met_by(diverged)
    assert Condition.parse("input attack: test_forget.accuracy.value > 0.55").met_by(diverged)  # it fails anyhow
    for other in (
        "input attack test_forget detached diluted, 4 turns",  # of a control
        "input attack 'capitals' on test_forget",  # changes no prompt
        "input attack test_retain unlearned capitals",
    ):
        skipped = dataclasses.replace(evaluation, skipped={other: "why"})
        assert not Condition.parse("input attack: test_forget.accuracy.value > 0.7").met_by(skipped)


def test_no_failures_where_no_condition_is_met(evaluation):
    assert failures(evaluation, [Condition.parse("test_retain.accuracy.value < 0.5")]) == []
    assert failures(evaluation, []) == []


def test_a_metric_that_is_not_there_is_an_error_that_lists_those_that_are(evaluation):
    with pytest.raises(ValueError, match=r"no test_forget.perplexity of 'utility'; it has .*test_forget\.accuracy"):
        Condition.parse("test_forget.perplexity.high > 0").met_by(evaluation)
    with pytest.raises(ValueError, match=r"nothing of it \(no time\)"):
        Condition.parse("relearning: train_forget.accuracy.high > 0").met_by(evaluation)


def test_an_end_that_is_not_known_is_an_error_and_not_passed(evaluation):
    one = evaluation.metric("utility", "test_forget", "accuracy")
    without = Evaluation({}, evaluation.measurements, {}, [dataclasses.replace(one, low=math.nan, high=math.nan)])
    with pytest.raises(ValueError, match=r"has no high, only the value 0\.2"):
        Condition.parse("test_forget.accuracy.high > 0.9").met_by(without)
    assert Condition.parse("test_forget.accuracy.value > 0.1").met_by(without)
    diverged = Evaluation({}, evaluation.measurements, {}, [dataclasses.replace(one, value=math.nan)])
    with pytest.raises(ValueError, match="has no value"):
        Condition.parse("test_forget.accuracy.value > 0.1").met_by(diverged)
