"""Thresholds and folds of gates, against what is computed by hand."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from gated_texts import forget_texts, retain_texts

from spul.gates import GateReport, Rate
from spul.gates.thresholds import checked_fit_texts, folds, threshold_for

FORGET = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
RETAIN = np.array([0.0, 2.5, -1.0])


@pytest.mark.parametrize(("recall", "expected"), [(1.0, 1.0), (0.81, 1.0), (0.8, 2.0), (0.5, 3.0), (0.2, 5.0)])
def test_the_threshold_is_the_highest_that_reaches_the_recall(recall, expected):
    assert threshold_for(FORGET, RETAIN, recall) == expected


def test_a_share_that_floats_miss_by_a_digit_is_reached_exactly():
    scores = np.arange(100.0)
    for percent in range(1, 101):
        threshold = threshold_for(scores, np.array([-1.0]), percent / 100)
        assert (scores >= threshold).sum() == percent


def test_a_threshold_that_flags_everything_is_refused_with_what_can_be_reached():
    with pytest.raises(ValueError, match=r"recall of 0.9 cannot be reached on 5 .* Reached without that: 0.8\."):
        threshold_for(FORGET, np.array([1.0, 7.0]), 0.9)
    assert threshold_for(FORGET, np.array([1.0, 7.0]), 0.8) == 2.0


def test_a_threshold_flags_as_many_of_the_texts_that_the_gate_was_fit_on():
    assert threshold_for(np.array([5.0, 6.0]), np.array([1.0]), 1.0, np.array([3.0, 9.0])) == 3.0
    assert threshold_for(np.array([5.0, 6.0]), np.array([1.0]), 1.0, np.array([7.0, 9.0])) == 5.0
    with pytest.raises(ValueError, match="cannot be reached"):
        threshold_for(np.array([5.0, 6.0]), np.array([4.0]), 1.0, np.array([3.0, 9.0]))


def test_too_few_rows_for_a_recall_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        threshold_for(np.arange(100.0), RETAIN - 5, 0.99)
        threshold_for(FORGET, RETAIN, 1.0)
        assert not caplog.records
        threshold_for(FORGET, RETAIN, 0.99)
    assert "at least 100 forget texts" in caplog.text


@pytest.mark.parametrize("recall", [0, -0.1, 1.01, "0.9", True, float("nan"), None])
def test_a_recall_out_of_range_is_refused(recall):
    with pytest.raises(ValueError, match=r"recall=.*expected a share above 0 and at most 1"):
        checked_fit_texts(["a", "b"], ["c", "d"], None, recall)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (([], ["c", "d"]), ValueError, r"forget_texts has 0 different"),
        ((["a", "b"], []), ValueError, r"retain_texts has 0 different"),
        ((["a", " A "], ["c", "d"]), ValueError, r"forget_texts has 1 different text\(s\) among 2"),
        ((["a", "B  c"], ["b C", "d"]), ValueError, r"1 texts are in forget_texts and in retain_texts, such as 'b c'"),
        ((["a", 5], ["c", "d"]), TypeError, r"1 of 2 texts are not strings"),
        (("ab", ["c", "d"]), TypeError, r"texts is one string"),
        ((["a", "b"], ["c", None]), TypeError, r"not strings"),
        ((["a", "b"], ["c", "d"], ["e", "D "]), ValueError, r"1 texts are in paraphrases and in retain_texts, .* 'd'"),
        ((["a", "b"], ["c", "d"], []), ValueError, r"paraphrases is empty"),
        ((["a", "b"], ["c", "d"], "a"), TypeError, r"texts is one string"),
    ],
)
def test_texts_that_no_gate_can_be_fit_on_are_refused(groups, error, message):
    forget, retain, paraphrases = (*groups, None)[:3]
    with pytest.raises(error, match=message):
        checked_fit_texts(forget, retain, paraphrases, 0.9)


def test_folds_share_both_groups_evenly_and_like_texts_never():
    forget = [*forget_texts(23), *(text.upper() + " " for text in forget_texts(23))]
    given = checked_fit_texts(forget, retain_texts(51), None, 0.9)
    fold = folds(given, seed=0)
    assert sorted(set(fold)) == [0, 1, 2, 3, 4]
    assert (fold[:23] == fold[23:46]).all()
    for group in (fold[:23], fold[46:]):
        counts = np.bincount(group)
        assert counts.max() - counts.min() <= 1
    assert (folds(given, seed=0) == fold).all()
    assert (folds(given, seed=1) != fold).any()
    few = checked_fit_texts(["a", "b", "a"], retain_texts(51), None, 0.9)
    assert sorted(folds(few, seed=0)[:3]) in ([0, 0, 1], [0, 1, 1])


def test_a_recall_of_nearly_nothing_flags_one_text_and_not_all():
    assert threshold_for(FORGET, RETAIN, 1e-12) == FORGET.max()


REPORT = GateReport(Rate(9, 10), Rate(0, 7), None, "by hand", 0.9)


def test_a_report_is_its_dict_again():
    assert GateReport.from_dict(REPORT.to_dict()) == REPORT
    other = GateReport(Rate(9, 10), Rate(0, 7), Rate(1, 1), "by hand")
    assert GateReport.from_dict(other.to_dict()) == other


@pytest.mark.parametrize(
    "damage",
    [
        {"recall": None},
        {"recall": 5},
        {"recall": {"flagged": 11, "texts": 10}},
        {"recall": {"flagged": -1, "texts": 10}},
        {"recall": {"flagged": 0, "texts": 0}},
        {"recall": {"flagged": "9", "texts": 10}},
        {"false_alarms": {"flagged": True, "texts": 10}},
        {"paraphrases": {"flagged": 1}},
        {"source": 5},
        {"recall_asked": 2},
        {"recall_asked": "0.9"},
    ],
)
def test_a_damaged_report_is_refused(damage):
    with pytest.raises(ValueError, match="report"):
        GateReport.from_dict({**REPORT.to_dict(), **damage})
    with pytest.raises(ValueError, match="report"):
        GateReport.from_dict({key: value for key, value in REPORT.to_dict().items() if key not in damage})
