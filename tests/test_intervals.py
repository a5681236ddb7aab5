"""Intervals over rows, seeds and both: known cases, coverage, and samples of which nothing can be said."""

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from spul.evaluation.metrics import bootstrap_interval, joined_interval, seeds_interval


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


@pytest.mark.parametrize(
    "interval", [bootstrap_interval, seeds_interval, lambda x, **how: joined_interval([x], **how)]
)
def test_bad_confidence_raises(interval):
    with pytest.raises(ValueError, match="such as"):
        interval([1.0, 2.0], confidence=95)


# ---- seeds ----


def test_of_seeds_it_is_students_t_by_hand():
    found = seeds_interval([1.0, 2.0, 6.0])
    half = 4.302653 * 7**0.5 / 3**0.5  # the table's value for two degrees of freedom; the variance is 7
    assert (found.estimate, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert seeds_interval([1.0, 2.0, 6.0], confidence=0.5).high < found.high


@pytest.mark.parametrize("num", [2, 3, 5])
def test_of_few_seeds_the_interval_holds_the_truth_as_often_as_it_says(num):
    """The bootstrap's did in 52, 70 and 86 of 100 cases."""
    draws = np.random.default_rng(num).normal(size=(1000, num))
    held = [found.low <= 0 <= found.high for found in map(seeds_interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[0.7], [0.7] * 3, [1.0, np.inf]])
def test_of_one_seed_of_seeds_alike_or_of_infinity_there_are_no_ends(values):
    found = seeds_interval(values)
    assert found.estimate == pytest.approx(np.mean(values))
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0, 2.0]]])
def test_bad_seeds_raise(values):
    with pytest.raises(ValueError, match="expected one number per seed"):
        seeds_interval(values)


# ---- rows and seeds ----


def test_joined_seeds_are_no_further_rows():
    """Ten seeds that all give the same row numbers leave the rows' uncertainty as it was."""
    rows = np.random.default_rng(3).normal(size=60)
    one, many = joined_interval([rows]), joined_interval([rows] * 10)
    assert one == bootstrap_interval(rows)
    half = t.ppf(0.975, 59) * rows.std(ddof=1) / 60**0.5
    assert (many.estimate, many.low, many.high) == pytest.approx((rows.mean(), rows.mean() - half, rows.mean() + half))
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1)


def test_joined_seeds_add_their_own_spread():
    """Rows that are alike and seeds that differ: the interval is that of the seeds."""
    seeds = np.random.default_rng(4).normal(size=(3, 1))
    found, alone = joined_interval(np.repeat(seeds, 30, axis=1)), seeds_interval(seeds[:, 0])
    assert (found.estimate, found.low, found.high) == pytest.approx((alone.estimate, alone.low, alone.high))


def test_joined_interval_is_by_its_formula():
    """Two seeds, three rows: 0 1 2 and 2 3 7. Mean squares by hand: seeds 13.5, rows 6.5, the rest 1.5."""
    found = joined_interval([[0.0, 1.0, 2.0], [2.0, 3.0, 7.0]])
    seeds, rows = 13.5, 6.5 - 1.5
    freedom = (seeds + rows) ** 2 / (seeds**2 / 1 + rows**2 / 2)
    half = max(t.ppf(0.975, freedom) * ((seeds + rows) / 6) ** 0.5, t.ppf(0.975, 1) * (seeds / 6) ** 0.5)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


@pytest.mark.parametrize("of_seeds", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("num", [2, 3, 12])
def test_joined_interval_holds_the_truth_at_least_about_as_often_as_it_says(num, of_seeds):
    """Rows and seeds with effects of their own. The bootstrap over both did in 86 of 100 cases with three seeds."""
    draws, held, trials = np.random.default_rng(5), 0, 500
    for _ in range(trials):
        values = draws.normal(0, of_seeds, (num, 1)) + draws.normal(size=(1, 40)) + draws.normal(size=(num, 40))
        found = joined_interval(values)
        held += found.low <= 0 <= found.high
    assert held / trials >= 0.925


def test_joined_intervals_of_shares_lie_within_0_and_1_and_hold_a_rare_share():
    """Three per cent of 200 rows, and seeds that differ much; an interval that is symmetric holds it in 82 of 100."""
    draws, held, trials = np.random.default_rng(6), 0, 0
    while trials < 500:
        hidden = draws.normal(0, 0.5, (3, 1)) + draws.normal(0, 0.5, (1, 200)) + draws.normal(0, 0.5**0.5, (3, 200))
        values = (hidden > 1.880794).astype(float)  # the standard normal's upper three per cent
        if values.any():
            found = joined_interval(values)
            assert 0 <= found.low < found.estimate < found.high <= 1
            held += found.low <= 0.03 <= found.high
            trials += 1
    assert held / trials >= 0.9


def test_seeds_with_as_many_right_answers_to_other_rows_have_an_interval():
    """Their means are alike by chance: they would not be of other rows."""
    found = joined_interval(np.eye(3, 100))
    assert found.estimate == 0.01
    assert 0 < found.low < 0.005
    assert 0.02 < found.high < 0.1


@pytest.mark.parametrize("values", [[[1.0] * 5] * 3, [[0.3], [0.4]], [[1.0, np.inf], [1.0, 2.0]]])
def test_where_rows_and_seeds_say_nothing_there_are_no_ends(values):
    found = joined_interval(values)
    assert found.estimate == np.mean(values)
    assert np.isnan([found.low, found.high]).all()


def test_seeds_with_rows_of_their_own_are_refused():
    with pytest.raises(ValueError, match="the same rows for every seed"):
        joined_interval([[1.0, 2.0], [1.0]])
