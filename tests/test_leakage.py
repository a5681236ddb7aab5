"""ROC numbers against scikit-learn and by hand; the two-sided verdict; PrivLeak's sign."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from spul.evaluation.metrics import (
    Interval,
    auc,
    auc_interval,
    bootstrap_interval,
    compare_with_retrained,
    priv_leak,
    true_positive_rate,
)


def normal(seed, mean, num):
    return np.random.default_rng(seed).normal(mean, 1, num)


def test_auc_is_scikit_learns_with_ties_too():
    for a, b in ((normal(0, 0.7, 40), normal(1, 0, 31)), (np.array([1, 2, 2, 3]), np.array([2, 2, 0, 3, 5]))):
        labels = np.r_[np.ones(len(a)), np.zeros(len(b))]
        assert auc(a, b) == pytest.approx(roc_auc_score(labels, np.r_[a, b]))
    several = auc(np.stack([normal(0, 0.7, 40)] * 2), np.stack([normal(1, 0, 31), normal(2, 0, 31)]))
    np.testing.assert_allclose(several, [auc(normal(0, 0.7, 40), normal(i, 0, 31)) for i in (1, 2)])


def plain_rate(members, others, at):
    """Every threshold tried."""
    rates = [
        (np.mean(others >= threshold), np.mean(members >= threshold))
        for threshold in [np.inf, *members.tolist(), *others.tolist()]
    ]
    return max(true for false, true in rates if false <= at)


@pytest.mark.parametrize("at", [0.01, 0.05, 0.3])
def test_true_positive_rate_equals_every_threshold_tried(at):
    members, others = normal(0, 1, 80).round(1), normal(1, 0, 150).round(1)  # rounded: there are ties
    assert true_positive_rate(members, others, at) == pytest.approx(plain_rate(members, others, at))


def test_true_positive_rate_by_hand():
    others = np.arange(100.0)
    assert true_positive_rate(np.array([99.5, 98.5, 97.5, 0.0]), others, at=0.01) == 0.5  # one of 100 may be wrong
    assert true_positive_rate(np.array([99.5, 98.5, 97.5, 0.0]), others[:-1], at=0.01) == 0.5  # none may
    assert true_positive_rate(np.array([-1.0, -2.0]), others) == 0.0
    with pytest.raises(ValueError, match="false-positive rate"):
        true_positive_rate(others, others, at=0)
    with pytest.raises(ValueError, match="0 scores of members"):
        true_positive_rate(others[:0], others)
    with pytest.raises(ValueError, match="0 of non-members"):
        auc(others, others[:0])


def test_true_positive_rate_of_several_samples_at_once_is_that_of_each():
    members, others = normal(0, 1, 80).reshape(4, 20).round(1), normal(1, 0, 200).reshape(4, 50).round(1)
    for at in (0.01, 0.1, 1.0):
        each = [plain_rate(some, other, at) for some, other in zip(members, others, strict=True)]
        np.testing.assert_allclose(true_positive_rate(members, others, at), each)
        np.testing.assert_allclose(true_positive_rate(members.T, others.T, at, axis=0), each)


def test_scores_that_are_nan_give_no_rate():
    scores = np.array([1.0, np.nan, 3.0])
    for members, others in ((scores, normal(0, 0, 9)), (normal(0, 0, 9), scores)):
        assert np.isnan(true_positive_rate(members, others))
        assert np.isnan(true_positive_rate(members, others, at=1.0))


def test_the_interval_of_an_auc_is_that_of_the_plain_statistic():
    members, others = normal(0, 0.5, 60).round(1), normal(1, 0, 45).round(1)  # there are ties
    fast = auc_interval(members, others, num_resamples=500, seed=3)
    plain = bootstrap_interval(members, others, statistic=auc, num_resamples=500, seed=3)
    assert (fast.estimate, fast.low, fast.high) == pytest.approx((plain.estimate, plain.low, plain.high), abs=1e-12)
    with pytest.raises(ValueError, match="NaN"):
        auc_interval(np.array([0.1, np.nan]), others)


def test_verdicts_are_two_sided():
    """The retrained model tells nothing apart; too high and too low both betray."""
    retrained = normal(0, 0, 300), normal(1, 0, 300)
    found = {shift: compare_with_retrained(normal(2, shift, 300), normal(3, 0, 300), *retrained) for shift in (2, -2)}
    assert found[2].verdict == "under-forgotten"
    assert found[-2].verdict == "over-forgotten"
    assert found[2].auc > 0.8
    assert found[-2].auc < 0.2
    assert found[2].true_positive_rate > 0.2 > 0.05 > found[2].reversed_true_positive_rate
    assert found[-2].reversed_true_positive_rate > 0.2 > 0.05 > found[-2].true_positive_rate
    assert found[2].retrained_auc == found[-2].retrained_auc == auc(*retrained)
    assert found[2].difference.estimate == found[2].auc - found[2].retrained_auc
    assert found[2].difference.low < found[2].difference.estimate


def test_a_model_like_the_retrained_is_not_told_apart_though_its_auc_is_far_from_one_half():
    """Members may differ from others by what they are; what counts is the retrained model's AUC, not one half."""
    members, others = normal(0, 1.5, 200), normal(1, 0, 200)
    retrained = members + normal(2, 0, 200) * 0.1, others + normal(3, 0, 200) * 0.1
    found = compare_with_retrained(members, others, *retrained)
    assert found.auc > 0.8
    assert found.verdict == "not told apart"


def test_the_same_rows_are_drawn_for_both_models():
    """Paired, a small difference that every row shows is seen; drawn apart it would drown."""
    members, others = normal(0, 0, 200), normal(1, 0, 200)
    found = compare_with_retrained(members + 0.25, others, members, others)
    assert found.verdict == "under-forgotten"
    apart = compare_with_retrained(normal(2, 0.25, 200), others, members, normal(3, 0, 200))
    assert apart.difference.high - apart.difference.low > 3 * (found.difference.high - found.difference.low)


def test_extremes_and_bad_input():
    low, high = np.arange(5.0), np.arange(5.0) + 10
    assert compare_with_retrained(high, low, low, high).verdict == "under-forgotten"
    assert compare_with_retrained(high, low, high, low).verdict == "not told apart"
    with pytest.raises(ValueError, match="the same rows"):
        compare_with_retrained(high, low, low[:4], high)
    with pytest.raises(ValueError, match="none of them NaN"):
        compare_with_retrained(high * np.nan, low, low, high)


def test_a_difference_that_resamples_do_not_share_is_not_told_apart_though_no_row_alone_changes_it():
    """BCa has no ends there: whichever row is left out, the difference is the same."""
    found = compare_with_retrained([1, 3], [0, 2], [-1, 1], [0, 2])
    assert found.difference == Interval(0.5, 0.0, 1.0)
    assert found.verdict == "not told apart"


def test_priv_leak_has_the_interval_of_rows_drawn_for_both_models():
    members, others = normal(0, 1.5, 200), normal(1, 0, 200)
    retrained = normal(2, 0.3, 200), normal(3, 0, 200)
    found = compare_with_retrained(members, others, *retrained).priv_leak
    assert found.estimate == priv_leak(auc(members, others), auc(*retrained))
    draws = np.random.default_rng(7)
    plain = []
    for _ in range(2_000):
        i, j = draws.integers(200, size=(2, 200))
        plain.append(priv_leak(auc(members[i], others[j]), auc(retrained[0][i], retrained[1][j])))
    # BCa shifts percentile ends a little
    assert (found.low, found.high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=2.5)
    assert np.isnan(compare_with_retrained(members, others, others + 9, others).priv_leak.estimate)
    # Among few rows some draws have a retrained AUC of 1.
    few = compare_with_retrained(members[:9], others[:9], np.r_[np.full(8, 9.0), 0.0], others[:9]).priv_leak
    assert np.isfinite(few.estimate)
    assert np.isnan([few.low, few.high]).all()


def test_priv_leak_has_muses_sign():
    """Members still recognized: -100 %; rows made so unlikely that they stand out: above 0; as retrained: 0."""
    assert priv_leak(1.0, 0.5) == -100
    assert priv_leak(0.0, 0.5) == 100
    assert priv_leak(0.53, 0.53) == 0
    # In MUSE's own terms, an AUC by which a high loss is the sign of a member.
    members, others, retrained = normal(0, 1, 50), normal(1, 0, 50), normal(2, 0.1, 50)
    labels = np.r_[np.ones(50), np.zeros(50)]
    theirs, reference = (roc_auc_score(labels, -np.r_[scores, others]) for scores in (members, retrained))
    assert priv_leak(auc(members, others), auc(retrained, others)) == pytest.approx(
        100 * (theirs - reference) / reference
    )
    with pytest.raises(ValueError, match="the second below 1"):
        priv_leak(0.5, 1.0)
