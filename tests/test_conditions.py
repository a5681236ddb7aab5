"""Conditions on metrics: read, never run; met by ends of intervals; unknown names are errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
from evaluations import measurement, utility

from spul.evaluation.conditions import Condition, failures
from spul.evaluation.results import Evaluation


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    attacked = [
        measurement(
            "input attack",
            "test_forget",
            "unlearned",
            name,
            per_row={"accuracy": [1.0] * right + [0.0] * (10 - right)},
        )
        for name, right in (("none", 2), ("capitals", 6))
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
        ("test_forget.accuracy.highest > 0", "'highest' is no end of an interval; expected one of low, value, high"),
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


def test_of_several_attacks_those_that_meet_it_are_named(evaluation):
    condition = Condition.parse("input attack: test_forget.accuracy.value > 0.3")
    assert [one.attack for one in condition.met_by(evaluation)] == ["capitals"]
    (line,) = failures(evaluation, [condition])
    assert line.startswith("input attack: test_forget.accuracy.value > 0.3: test_forget.accuracy (capitals) is 0.6 [")


def test_no_failures_where_no_condition_is_met(evaluation):
    assert failures(evaluation, [Condition.parse("test_retain.accuracy.value < 0.5")]) == []
    assert failures(evaluation, []) == []


def test_a_metric_that_is_not_there_is_an_error_that_lists_those_that_are(evaluation):
    with pytest.raises(ValueError, match=r"no test_forget.accurcy of 'utility'; it has .*test_forget\.accuracy"):
        Condition.parse("test_forget.accurcy.high > 0").met_by(evaluation)
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
