"""How sure a measured number is: bootstrap confidence intervals, over rows, and over rows and seeds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

# As many numbers of resamples are held at a time.
MAX_NUMBERS = 2**22
# BCa computes the statistic once without each row. With more rows than this it takes long, and has little to correct.
MAX_JACKKNIFE = 2_000


@dataclass(frozen=True)
class Interval:
    """A number and its confidence interval.

    Attributes:
        estimate: the number, of the data as they are.
        low: the interval's lower end; NaN where the bootstrap cannot say.
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
    """A number of some rows with its bias-corrected and accelerated (BCa) bootstrap interval.

    Of more than 2,000 rows it is the percentile interval, since BCa's correction vanishes and its cost does not.

    Where the bootstrap has nothing to say, the ends are NaN: a sample of one row, or rows that give the same number
    however they are drawn, such as ten right answers of ten. A width of 0 would claim a certainty that nobody has.

    Args:
        samples: a number per row; several samples are drawn each for itself, as members and non-members.
        statistic: from the samples to a number; vectorised if it takes `axis`, else called once per resample.
        confidence: how often such an interval holds the true number, above 0 and below 1.
        num_resamples: how many are drawn.
        seed: seed of the draws.

    Raises:
        ValueError: if a sample is empty, not one-dimensional or has NaN, or `confidence` is out of range.

    Source: Efron, *Better Bootstrap Confidence Intervals*, 1987, as `scipy.stats.bootstrap` has it
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}; expected a share above 0 and below 1, such as 0.95.")
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
        warnings.simplefilter("ignore", DegenerateDataWarning)  # it says what NaN ends say
        found = bootstrap(
            arrays,
            statistic,
            n_resamples=num_resamples,
            batch=max(1, MAX_NUMBERS // sum(map(len, arrays))),
            confidence_level=confidence,
            method="BCa" if sum(map(len, arrays)) <= MAX_JACKKNIFE else "percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = (float(end) for end in found.confidence_interval)
    if high - low <= 1e-12 * abs(estimate):  # all draws alike, but for rounding
        low = high = np.nan
    return Interval(estimate, low, high)


def joined_interval(
    per_seed: Sequence[Sequence[float]] | np.ndarray,
    confidence: float = 0.95,
    num_resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """The mean over rows and seeds, with an interval for both: seeds are drawn anew, and rows, the same in each seed.

    The rows stay together, since a row that is hard under one seed is hard under the next: seeds are no further rows.
    With one seed only rows are drawn, and the interval says nothing of other seeds. With few seeds it is too narrow
    (with three, by about a fifth in what the seeds add). Numbers that exist once per seed, such as an AUC, go to
    `bootstrap_interval`.

    Args:
        per_seed: (seeds, rows), the same rows in the same order for each seed.
        confidence: as `bootstrap_interval`.
        num_resamples: as `bootstrap_interval`.
        seed: seed of the draws.

    Raises:
        ValueError: if the seeds have different numbers of rows, or as `bootstrap_interval`.

    Source: Owen, *The pigeonhole bootstrap*, https://arxiv.org/abs/0712.1111, with BCa ends
    """
    if len({len(values) for values in per_seed}) != 1:
        raise ValueError(
            f"seeds with {[len(values) for values in per_seed]} rows; expected the same rows for every seed. Where "
            "each seed has rows of its own, give bootstrap_interval one number per seed."
        )
    values = np.asarray(per_seed, dtype=np.float64)
    if values.ndim != 2 or np.isnan(values).any():
        raise ValueError(f"per_seed has the shape {values.shape}, or NaN in it; expected numbers (seeds, rows).")
    options: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    if len(values) == 1:
        return bootstrap_interval(values[0], **options)

    def mean(seeds: np.ndarray, rows: np.ndarray, axis: int = -1) -> np.ndarray:
        """Of what was drawn: every drawn row under every drawn seed counts once, so weights say it all."""
        of_seeds, of_rows = draw_counts(seeds, values.shape[0]), draw_counts(rows, values.shape[1])
        return ((of_seeds @ values) * of_rows).sum(axis=axis) / (seeds.shape[axis] * rows.shape[axis])

    return bootstrap_interval(*(np.arange(num) for num in values.shape), statistic=mean, **options)


def draw_counts(drawn: np.ndarray, num: int) -> np.ndarray:
    """How often each of `num` was drawn: (..., draws) to (..., num)."""
    flat = drawn.reshape(-1, drawn.shape[-1]).astype(int)
    offsets = np.arange(len(flat))[:, None] * num
    return np.bincount((flat + offsets).ravel(), minlength=len(flat) * num).reshape(*drawn.shape[:-1], num)
