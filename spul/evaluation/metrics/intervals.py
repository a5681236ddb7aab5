"""Confidence intervals of metrics: over rows (bootstrap), over seeds, and over both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, t

# Number of resampled values in memory at a time.
MAX_NUMBERS = 2**22
# BCa computes the statistic once without each row. Above this number of rows it is slow and corrects little.
MAX_JACKKNIFE = 2_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        estimate: the value for the data.
        low: the interval's lower end; NaN if the data do not determine it.
        high: its upper end; NaN likewise.
    """

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    *samples: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    num_resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """A statistic of rows with its bias-corrected and accelerated (BCa) bootstrap interval.

    Above 2,000 rows it is the percentile interval: BCa's correction vanishes there and its cost does not. So it is
    where BCa has no ends though resamples differ, as where the statistic is the same whichever row is left out.

    The ends are NaN where the bootstrap fails: for a sample of one row, or if every resample has the same value, such
    as ten right answers of ten. A width of 0 would claim certainty.

    Args:
        samples: one value per row; several samples, such as members and non-members, are resampled independently.
        statistic: from the samples to a value; vectorized if it takes `axis`, else called once per resample.
        confidence: how often such an interval holds the true value, above 0 and below 1.
        num_resamples: number of resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: if a sample is empty, not one-dimensional or has NaN, or `confidence` is out of range.

    Source: Efron, *Better Bootstrap Confidence Intervals*, 1987, as in `scipy.stats.bootstrap`
    """
    _check_confidence(confidence)
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or any(array.ndim != 1 or len(array) == 0 or np.isnan(array).any() for array in arrays):
        raise ValueError(
            f"samples of the shapes {[array.shape for array in arrays]}, {sum(np.isnan(a).sum() for a in arrays)} "
            "values NaN; expected one or more samples of at least one number each, none of them NaN."
        )
    estimate = float(statistic(*arrays))
    if any(len(array) < 2 for array in arrays):
        return Interval(estimate, np.nan, np.nan)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)  # the ends are NaN then
        found = bootstrap(
            arrays,
            statistic,
            n_resamples=num_resamples,
            batch=max(1, MAX_NUMBERS // sum(map(len, arrays))),
            confidence_level=confidence,
            method="BCa" if sum(map(len, arrays)) <= MAX_JACKKNIFE else "percentile",
            rng=np.random.default_rng(seed),
        )
    ends, drawn = found.confidence_interval, found.bootstrap_distribution
    if np.isnan(ends).any() and np.isfinite(drawn).all():
        ends = np.percentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)])
    return _unless_alike(estimate, *(float(end) for end in ends))


def seeds_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean of values with one per seed, with Student's t interval.

    The bootstrap is too narrow here: over three seeds, its 95 % intervals hold the truth in 70 of 100 cases.

    The ends are NaN for one seed, for equal values, or if a value is infinite.

    Args:
        values: one per seed.
        confidence: how often such an interval holds the true value, above 0 and below 1.

    Raises:
        ValueError: if there are no values, they are not one-dimensional or have NaN, or `confidence` is out of range.

    Source: Student, *The Probable Error of a Mean*, 1908, as in `scipy.stats.t`
    """
    _check_confidence(confidence)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or np.isnan(array).any():
        raise ValueError(
            f"values of the shape {array.shape}, {np.isnan(array).sum()} of them NaN; expected one number per seed."
        )
    mean = float(array.mean())
    if len(array) == 1 or not np.isfinite(array).all():
        return Interval(mean, np.nan, np.nan)
    half = float(t.ppf((1 + confidence) / 2, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
    return _unless_alike(mean, mean - half, mean + half)


def joined_interval(per_seed: Sequence[Sequence[float]] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean over rows and seeds, with an interval for both.

    The variance of the mean is that of a two-way layout with random effects of rows, of seeds, and a residual, so
    seeds do not count as further rows. The interval is Student's t with Satterthwaite's degrees of freedom, and never
    narrower than Student's t over the seeds' means: with two or three seeds the variance itself is uncertain. If all
    values are 0 or 1 it has Wilson's form, for a share with this variance: it lies within 0..1 and suits rare answers
    better.

    With one seed it is `bootstrap_interval` over rows, and does not cover other seeds. The ends are NaN for one row or
    for equal values. Metrics with one value per seed, such as an AUC, go to `seeds_interval`.

    Args:
        per_seed: (seeds, rows), the same rows in the same order for each seed.
        confidence: as `seeds_interval`.

    Raises:
        ValueError: if the seeds have different numbers of rows, there are none, or one is NaN, or `confidence` is out
            of range.

    Source: Satterthwaite, *An Approximate Distribution of Estimates of Variance Components*, 1946; for shares Wilson,
    *Probable Inference, the Law of Succession, and Statistical Inference*, 1927
    """
    _check_confidence(confidence)
    if len({len(values) for values in per_seed}) != 1:
        raise ValueError(
            f"seeds with {[len(values) for values in per_seed]} rows; expected the same rows for every seed. Where "
            "each seed has rows of its own, give seeds_interval one value per seed."
        )
    values = np.asarray(per_seed, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or np.isnan(values).any():
        raise ValueError(f"per_seed has the shape {values.shape}, or NaN in it; expected numbers (seeds, rows).")
    if len(values) == 1:
        return bootstrap_interval(values[0], confidence=confidence)
    mean = float(values.mean())
    if values.shape[1] == 1 or not np.isfinite(values).all():
        return Interval(mean, np.nan, np.nan)
    half = _half_width(values, confidence)
    found = _unless_alike(mean, mean - half, mean + half)
    if np.isin(values, (0, 1)).all() and not np.isnan(found.low):
        ratio = half**2 / (mean * (1 - mean))  # z**2 / n in Wilson's own, of n rows
        middle, half = (mean + ratio / 2) / (1 + ratio), (half**2 + ratio**2 / 4) ** 0.5 / (1 + ratio)
        found = Interval(mean, max(0.0, middle - half), min(1.0, middle + half))
    return found


def _half_width(values: np.ndarray, confidence: float) -> float:
    """Half the width of the interval of the mean of values (seeds, rows)."""
    (num_seeds, num_rows), above = values.shape, (1 + confidence) / 2
    of_seeds = values.mean(axis=1, keepdims=True) - values.mean()
    of_rows = values.mean(axis=0, keepdims=True) - values.mean()
    rest = values - values.mean() - of_seeds - of_rows
    # Mean squares: variances of the mean times seeds * rows. The residual is part of both others, which fall below it
    # only by chance, and counts once.
    both = float((rest**2).sum()) / ((num_seeds - 1) * (num_rows - 1))
    means = num_rows * float((of_seeds**2).sum()) / (num_seeds - 1)
    seeds = max(both, means)
    rows = max(both, num_seeds * float((of_rows**2).sum()) / (num_rows - 1)) - both
    if seeds + rows == 0:
        return 0.0
    freedom = (seeds + rows) ** 2 / (seeds**2 / (num_seeds - 1) + rows**2 / (num_rows - 1))
    widths = t.ppf(above, freedom) * (seeds + rows) ** 0.5, t.ppf(above, num_seeds - 1) * means**0.5
    return float(max(widths)) / (num_seeds * num_rows) ** 0.5


def _unless_alike(estimate: float, low: float, high: float) -> Interval:
    """The interval, with NaN ends if its width is 0 up to rounding: all values, or all resamples, are equal."""
    if high - low <= 1e-12 * abs(estimate):
        low = high = np.nan
    return Interval(estimate, low, high)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}; expected a share above 0 and below 1, such as 0.95.")


def draw_counts(drawn: np.ndarray, num: int) -> np.ndarray:
    """Counts of the draws of each of `num` indices: (..., draws) to (..., num)."""
    flat = drawn.reshape(-1, drawn.shape[-1]).astype(int)
    offsets = np.arange(len(flat))[:, None] * num
    return np.bincount((flat + offsets).ravel(), minlength=len(flat) * num).reshape(*drawn.shape[:-1], num)
