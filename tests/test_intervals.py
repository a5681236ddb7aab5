"""Bootstrap intervals: known cases, coverage, and samples of which a bootstrap can say nothing."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from spul.evaluation import bootstrap_interval, joined_interval


def test_equals_scipys_own_and_is_seeded():
    values = np.random.default_rng(0).exponential(size=40)
    found = bootstrap_interval(values, num_resamples=500, seed=3)
    plain = bootstrap((values,), np.mean, n_resamples=500, rng=np.random.default_rng(3)).confidence_interval
    assert (found.low, found.high) == (plain.low, plain.high)
    assert found.estimate == values.mean()
    assert bootstrap_interval(values, num_resamples=500, seed=3) == found
    assert bootstrap_interval(values, num_resamples=500, seed=4) != found
    assert bootstrap_interval(values, num_resamples=500, confidence=0.5).high < found.high


def test_of_many_rows_is_the_textbook_interval():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=900)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / 30
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_two_samples_and_a_statistic_without_an_axis():
    draws = np.random.default_rng(2)
    a, b = draws.normal(3, 1, 50), draws.normal(1, 1, 30)
    found = bootstrap_interval(a, b, statistic=lambda x, y: np.median(x) - np.median(y), num_resamples=300)
    assert found.low < np.median(a) - np.median(b) < found.high
    assert found.low > 1


@pytest.mark.parametrize("values", [[0.7], [1.0] * 10])
def test_what_a_bootstrap_cannot_say_is_nan_and_not_a_width_of_zero(values):
    found = bootstrap_interval(values)
    assert found.estimate == values[0]
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0, 2.0]]])
def test_bad_samples_raise(values):
    with pytest.raises(ValueError, match="none of them NaN"):
        bootstrap_interval(values)


def test_bad_confidence_raises():
    with pytest.raises(ValueError, match="such as"):
        bootstrap_interval([1.0, 2.0], confidence=95)


def test_joined_seeds_are_no_further_rows():
    """Ten seeds that all give the same row numbers leave the rows' uncertainty as it was."""
    rows = np.random.default_rng(3).normal(size=60)
    one, many = joined_interval([rows], num_resamples=2000), joined_interval([rows] * 10, num_resamples=2000)
    assert one == bootstrap_interval(rows, num_resamples=2000)
    assert many.estimate == pytest.approx(rows.mean())
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1)


def test_joined_seeds_add_their_own_spread():
    """Rows that are alike and seeds that differ: the interval is that of the seeds."""
    seeds = np.random.default_rng(4).normal(size=(20, 1))
    found = joined_interval(np.repeat(seeds, 30, axis=1), num_resamples=4000)
    alone = bootstrap_interval(seeds[:, 0], num_resamples=4000)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.05)
    assert found.estimate == pytest.approx(seeds.mean())


def test_joined_interval_holds_the_truth_about_as_often_as_it_says():
    """Seeds and rows with effects of their own; 90 % asked for, with twelve seeds a little less is to be expected."""
    draws, held, trials = np.random.default_rng(5), 0, 150
    for _ in range(trials):
        values = draws.normal(size=(12, 1)) + draws.normal(size=(1, 40)) + draws.normal(size=(12, 40))
        found = joined_interval(values, confidence=0.9, num_resamples=300)
        held += found.low <= 0 <= found.high
    assert 0.8 <= held / trials <= 0.97


def test_seeds_with_rows_of_their_own_are_refused():
    with pytest.raises(ValueError, match="the same rows for every seed"):
        joined_interval([[1.0, 2.0], [1.0]])
