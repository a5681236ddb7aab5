"""The verdict of a report: whether what the base knew of the forget rows is forgotten, asked without attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from ..metrics.table import metric_of
from ..results import Evaluation
from .wording import first, knowledge_name, spaced, value_in_words

FORGOTTEN, PARTLY, NOT, NOTHING, NONE = (
    "Forgotten",
    "Partly forgotten",
    "Not forgotten",
    "Nothing to forget",
    "No verdict",
)
# Shares of what the base knew that are still answered: up to the first it is forgotten, from the second on it is not.
FORGOTTEN_UP_TO, NOT_FROM = 0.05, 0.5
ROWS = ("test_forget", "train_forget")


@dataclass(frozen=True)
class Verdict:
    """Whether the forget rows are forgotten.

    Attributes:
        word: `FORGOTTEN`, `PARTLY`, `NOT`, `NOTHING` (the base knew nothing) or `NONE` (the measurements do not tell).
        reason: the numbers behind it.
        kept: share of what the base knew that is still answered; NaN where there is no such share.
    """

    word: str
    reason: str
    kept: float = math.nan

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


def verdict(evaluation: Evaluation) -> Verdict | None:
    """The verdict on the test or the train forget rows, whichever keep more; None if neither was measured."""
    judge = _of_probability if knowledge_name(evaluation) == "probability" else _of_rows
    found = [one for rows in ROWS if (one := judge(evaluation, rows)) is not None]
    told = [one for one in found if not math.isnan(one.kept)]
    return max(told, key=lambda one: (one.kept, one.word != NONE)) if told else next(iter(found), None)


def right(evaluation: Evaluation, rows: str, model: str) -> np.ndarray | None:
    """Which rows a model answers right, those of all seeds in a row; None if not measured."""
    found = [
        np.asarray(one.per_row["accuracy"]) > 0.5
        for one in evaluation.measurements
        if (one.measure, one.rows, one.model) == ("utility", rows, model) and "accuracy" in one.per_row
    ]
    return np.concatenate(found) if found else None


def _of_rows(evaluation: Evaluation, rows: str) -> Verdict | None:
    """By the rows that the base answered right, or by all where its answers are not known."""
    after, before = (right(evaluation, rows, model) for model in ("unlearned", "detached"))
    if after is None:
        return None
    is_compared = before is not None and len(before) == len(after)
    known = after[before] if is_compared else after
    seeds = max(one.num_seeds for one in evaluation.metrics)
    of_seeds = f" of {seeds} seeds" if seeds > 1 else ""
    if not len(known):
        return Verdict(NOTHING, f"the base itself answered none of the {len(after):,} {spaced(rows)} rows{of_seeds}.")
    num, kept = len(known), float(known.mean())
    that = " that the base knew" if is_compared and num < len(after) else ""
    are = "is" if known.sum() == 1 else "are"
    text = f"{known.sum():,} of {num:,} {spaced(rows)} rows{of_seeds}{that} {are} still answered right"
    text += "" if is_compared else "; what the base knew of them was not measured"
    low, high = _interval(kept, num, seeds)
    if len({_word(one) for one in (low, kept, high)}) > 1:
        text += f". With so few rows, {100 * low:.0f} to {100 * high:.0f} % is possible (95 % interval)"
    return Verdict(_word_within(low, kept, high), f"{text}.", kept)


def _interval(share: float, num: int, seeds: int) -> tuple[float, float]:
    """Wilson's interval; the same rows under several seeds count once."""
    num = max(1, round(num / seeds))
    found = binomtest(round(share * num), num).proportion_ci(method="wilson")
    return min(found.low, share), max(found.high, share)


def _of_probability(evaluation: Evaluation, rows: str) -> Verdict | None:
    """By the probability of free-form answers, between the retrained model's and the base's.

    An answer that was never learned has some probability too, so without a retrained model none is low enough.
    """
    fields = {"measure": "utility", "rows": rows, "name": "probability"}
    after, before, retrained = (
        first(evaluation, **fields, model=model) for model in ("unlearned", "detached", "retrained")
    )
    if after is None:
        return None
    label = f"{spaced(rows)} {metric_of('probability').label}"
    if before is None:
        return Verdict(NONE, f"{label} is {value_in_words(after)}, but the base's was not measured.")
    text = f"{label} is {value_in_words(after)}, the base's {value_in_words(before)}"
    if retrained is None:
        kept = after.value / before.value if before.value else 0.0
        if kept >= NOT_FROM:
            return Verdict(NOT, f"{text}.", kept)
        return Verdict(NONE, f"{text}. Only a retrained model tells how low it would be without the forget rows.")
    text += f", the retrained model's {value_in_words(retrained)}"
    if before.value <= retrained.value:
        return Verdict(NOTHING, f"{text}.")
    low, kept, high = (
        (one - retrained.value) / (before.value - retrained.value) for one in (after.low, after.value, after.high)
    )
    word = _word_within(low, kept, high)
    text += "; its interval reaches from forgotten to not forgotten" if word == NONE else ""
    return Verdict(word, f"{text}.", kept)


def _word_within(low: float, kept: float, high: float) -> str:
    """The word for a share, unless its interval reaches from forgotten to not forgotten. NaN ends are no interval."""
    return NONE if low <= FORGOTTEN_UP_TO and high >= NOT_FROM else _word(kept)


def _word(kept: float) -> str:
    return FORGOTTEN if kept <= FORGOTTEN_UP_TO else PARTLY if kept < NOT_FROM else NOT
