"""Success of a membership attack, compared with its success on a model retrained without the forget rows.

The goal is not that an attack finds nothing, but that it finds as much as in the retrained model: an AUC far *below*
one half reveals as clearly as one above that these rows were treated in a special way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import mannwhitneyu

from .intervals import Interval, bootstrap_interval, draw_counts

Verdict = Literal["under-forgotten", "over-forgotten", "not told apart"]


def auc(members: np.ndarray, non_members: np.ndarray, axis: int = -1) -> np.ndarray:
    """Area under the ROC curve: how often a member scores higher than a non-member; ties count half.

    One half is chance. Best is the AUC of the retrained model: see `compare_with_retrained`. `auc_interval` adds an
    interval.

    Args:
        members: scores, (rows,), or more dimensions for several samples at once.
        non_members: scores.
        axis: the axis of the rows.

    Raises:
        ValueError: if there are no members, or no non-members.
    """
    _check_both(members, non_members)
    found = mannwhitneyu(members, non_members, axis=axis, method="asymptotic")
    return found.statistic / (np.shape(members)[axis] * np.shape(non_members)[axis])


def auc_interval(
    members: np.ndarray, non_members: np.ndarray, confidence: float = 0.95, num_resamples: int = 2_000, seed: int = 0
) -> Interval:
    """AUC with its bootstrap interval; rows are sorted once for all resamples.

    Args:
        members: scores, (rows,).
        non_members: scores, (rows,).
        confidence: as `bootstrap_interval`.
        num_resamples: as `bootstrap_interval`.
        seed: as `bootstrap_interval`.

    Raises:
        ValueError: as `bootstrap_interval`, and if a score is NaN.
    """
    found = _drawn_auc(members, non_members)
    indices = np.arange(len(members)), np.arange(len(non_members))
    return bootstrap_interval(*indices, statistic=found, confidence=confidence, num_resamples=num_resamples, seed=seed)


def _drawn_auc(members: np.ndarray, non_members: np.ndarray) -> Callable[..., np.ndarray]:
    """AUC of resampled rows as a function of their indices, thousands of resamples at once, without sorting again."""
    if np.isnan(members).any() or np.isnan(non_members).any():
        raise ValueError("scores are NaN; expected numbers.")
    order = np.argsort(non_members)
    below, upto = (np.searchsorted(non_members[order], members, side) for side in ("left", "right"))
    rank = np.argsort(order)

    def of_drawn(i: np.ndarray, j: np.ndarray, axis: int = -1) -> np.ndarray:
        i, j = np.moveaxis(i, axis, -1).astype(int), np.moveaxis(j, axis, -1).astype(int)
        passed = draw_counts(rank[j], len(order)).cumsum(axis=-1)
        passed = np.concatenate([np.zeros_like(passed[..., :1]), passed], axis=-1)
        wins = passed[..., below] + passed[..., upto]  # of each member over the drawn non-members, twice
        drawn = np.take_along_axis(wins, i, axis=-1)
        return drawn.sum(axis=-1) / (2 * i.shape[-1] * j.shape[-1])  # of whole numbers, so exact

    return of_drawn


def true_positive_rate(members: np.ndarray, non_members: np.ndarray, at: float = 0.01, axis: int = -1) -> np.ndarray:
    """Largest share of members found while at most a share `at` of non-members is mistaken for members; low is better.

    With fewer than `1 / at` non-members none may be mistaken: report their number beside the rate.

    Args:
        members: scores, (rows,), or more dimensions for several samples at once.
        non_members: scores.
        at: the false-positive rate, above 0 and at most 1.
        axis: the axis of the rows.

    Returns:
        The rate; NaN where a score is NaN.

    Raises:
        ValueError: if `at` is out of range, or there are no members, or no non-members.

    Source: Carlini et al., *Membership Inference Attacks From First Principles*, https://arxiv.org/abs/2112.03570
    """
    if not 0 < at <= 1:
        raise ValueError(f"at={at!r}; expected a false-positive rate above 0 and at most 1, such as 0.01.")
    _check_both(members, non_members)
    members, non_members = np.moveaxis(members, axis, -1), np.moveaxis(non_members, axis, -1)
    num = non_members.shape[-1]
    allowed = int(np.floor(at * num + 1e-9))  # a share of 0.3 of ten rows is three
    if allowed >= num:
        first_refused = np.full(members.shape[:-1], -np.inf)
    else:
        first_refused = np.partition(non_members, num - 1 - allowed, axis=-1)[..., num - 1 - allowed]
    unknown = np.isnan(members).any(axis=-1) | np.isnan(non_members).any(axis=-1)
    return np.where(unknown, np.nan, (members > first_refused[..., None]).mean(axis=-1))


def _check_both(members: np.ndarray, non_members: np.ndarray) -> None:
    if not (np.size(members) and np.size(non_members)):
        raise ValueError(
            f"{np.size(members)} scores of members and {np.size(non_members)} of non-members; expected some of both."
        )


def priv_leak(auc_found: float, retrained_auc: float) -> float:
    """MUSE's PrivLeak, in percent; 0 is best.

    `100 (a - a_retrained) / a_retrained` with `a = 1 - AUC`: MUSE counts a *low* score (a high loss) as the sign of a
    member, so its AUC is 1 - AUC here, and the formula is in its terms. Negative: members are still recognized (-100
    where the AUC here is 1). Positive: they stand out by their high loss. MUSE attacks by min-k with a share of 0.4.

    Args:
        auc_found: the AUC of the unlearned model, as `auc` returns it.
        retrained_auc: that of the model retrained without the forget rows.

    Raises:
        ValueError: if an AUC is not in 0..1, or `retrained_auc` is 1, which leaves nothing to compare with.

    Source: Shi et al., *MUSE*, https://arxiv.org/abs/2407.06460
    """
    if not (0 <= auc_found <= 1 and 0 <= retrained_auc < 1):
        raise ValueError(
            f"auc_found={auc_found!r}, retrained_auc={retrained_auc!r}; expected both in 0..1, and the second below 1."
        )
    return float(_leak(auc_found, retrained_auc))


def _leak(auc_found: Any, retrained_auc: Any) -> Any:
    return 100 * ((1 - auc_found) - (1 - retrained_auc)) / (1 - retrained_auc)


@dataclass(frozen=True)
class Leakage:
    """Success of an attack on the forget rows, and on a model retrained without them.

    Attributes:
        auc: of the unlearned model.
        retrained_auc: of the retrained model.
        difference: `auc` less `retrained_auc`, with its interval over rows; 0 is best.
        priv_leak: MUSE's form of it, in percent, likewise; NaN if `retrained_auc` is 1; its interval is NaN if that
            holds for some resamples.
        true_positive_rate: share of members found by their high scores, at the given false-positive rate.
        reversed_true_positive_rate: share of members found by their low scores: rows that were made unlikely.
        retrained_true_positive_rate: as `true_positive_rate`, of the retrained model.
        retrained_reversed_true_positive_rate: as `reversed_true_positive_rate`, of the retrained model.
        verdict: "under-forgotten" if the whole interval is above 0, "over-forgotten" if below, else "not told apart",
            which with few rows may only mean that there are few rows, and always results from a single one.
    """

    auc: float
    retrained_auc: float
    difference: Interval
    priv_leak: Interval
    true_positive_rate: float
    reversed_true_positive_rate: float
    retrained_true_positive_rate: float
    retrained_reversed_true_positive_rate: float
    verdict: Verdict


def compare_with_retrained(
    members: np.ndarray,
    non_members: np.ndarray,
    retrained_members: np.ndarray,
    retrained_non_members: np.ndarray,
    at: float = 0.01,
    confidence: float = 0.95,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> Leakage:
    """Compare one attack on the unlearned and on the retrained model, two-sided: an AUC may be too high or too low.

    Args:
        members: scores of the forget rows under the unlearned model, (rows,).
        non_members: scores of unseen rows under the unlearned model.
        retrained_members: scores of the same forget rows, in the same order, under the retrained model.
        retrained_non_members: scores of the same unseen rows under the retrained model.
        at: false-positive rate of the true-positive rates.
        confidence: of the intervals.
        num_resamples: of the bootstrap; a resample holds the same rows for both models.
        seed: seed of the draws.

    Raises:
        ValueError: if the numbers of rows of the two models differ, or a score is NaN.
    """
    ours = [np.asarray(scores, dtype=np.float64) for scores in (members, non_members)]
    theirs = [np.asarray(scores, dtype=np.float64) for scores in (retrained_members, retrained_non_members)]
    if [x.shape for x in ours] != [x.shape for x in theirs] or any(np.isnan(x).any() for x in (*ours, *theirs)):
        raise ValueError(
            f"members and non-members of the shapes {[x.shape for x in ours]} and of the retrained model "
            f"{[x.shape for x in theirs]}; expected scores of the same rows by both models, none of them NaN."
        )

    our_auc, their_auc = _drawn_auc(ours[0], ours[1]), _drawn_auc(theirs[0], theirs[1])

    def over_rows(compare: Callable[[Any, Any], Any]) -> Interval:
        """Comparison of the two AUCs, with its interval."""

        def compared(i: np.ndarray, j: np.ndarray, axis: int = -1) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):  # a retrained AUC of 1 has no PrivLeak
                return compare(our_auc(i, j, axis), their_auc(i, j, axis))

        indices = (np.arange(len(x)) for x in ours)
        found = bootstrap_interval(
            *indices, statistic=compared, confidence=confidence, num_resamples=num_resamples, seed=seed
        )
        finite = np.isfinite([found.low, found.high]).all()
        return found if finite else Interval(found.estimate, np.nan, np.nan)

    found = over_rows(np.subtract)
    low, high = found.low, found.high
    if np.isnan(low) and min(len(x) for x in ours) > 1:
        low = high = found.estimate  # the resamples are alike
    verdict: Verdict = "under-forgotten" if low > 0 else "over-forgotten" if high < 0 else "not told apart"
    return Leakage(
        auc=float(auc(ours[0], ours[1])),
        retrained_auc=float(auc(theirs[0], theirs[1])),
        difference=found,
        priv_leak=over_rows(_leak) if auc(theirs[0], theirs[1]) < 1 else Interval(np.nan, np.nan, np.nan),
        true_positive_rate=float(true_positive_rate(ours[0], ours[1], at)),
        reversed_true_positive_rate=float(true_positive_rate(-ours[0], -ours[1], at)),
        retrained_true_positive_rate=float(true_positive_rate(theirs[0], theirs[1], at)),
        retrained_reversed_true_positive_rate=float(true_positive_rate(-theirs[0], -theirs[1], at)),
        verdict=verdict,
    )
