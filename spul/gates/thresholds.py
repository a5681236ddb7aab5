"""Thresholds for a recall, and the report of a gate: recall and false alarms with intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ..data.checks import checked_texts
from ..records.fields import is_count, is_finite_number

logger = logging.getLogger(__name__)

NUM_FOLDS = 5
RATES = ("recall", "false_alarms", "paraphrases")


@dataclass(frozen=True)
class Rate:
    """A share of texts that were flagged.

    Attributes:
        flagged: number of texts flagged.
        texts: number of texts.
    """

    flagged: int
    texts: int

    @property
    def share(self) -> float:
        """The share of the texts that were flagged."""
        return self.flagged / self.texts

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share.

        Source: Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, 1927
        """
        found = binomtest(self.flagged, self.texts).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({self.flagged:,} of {self.texts:,}; 95 % interval {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class GateReport:
    """Shares of texts that a gate flags.

    Attributes:
        recall: of held-out forget texts.
        false_alarms: of held-out retain texts.
        paraphrases: of rewordings of forget texts; None where none were given.
        source: where the texts come from, such as `"cross-validation, 5 folds"`.
        recall_asked: the recall that the threshold was set for; None where it was not.
    """

    recall: Rate
    false_alarms: Rate
    paraphrases: Rate | None
    source: str
    recall_asked: float | None = None

    def __str__(self) -> str:
        asked = "" if self.recall_asked is None else f", asked for {self.recall_asked:.1%}"
        lines = [f"recall {self.recall}{asked}", f"false alarms {self.false_alarms}"]
        if self.paraphrases is not None:
            lines.append(f"paraphrases {self.paraphrases}")
        return "\n".join([*lines, f"texts: {self.source}"])

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict, for JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateReport:
        """The report of a dict.

        Raises:
            ValueError: if it is not that of a report.
        """
        try:
            rates = [None if data[name] is None else Rate(**data[name]) for name in RATES]
            source, asked = data["source"], data["recall_asked"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"report is {data!r:.200} ({error}); expected what GateReport.to_dict returns."
            ) from error
        recall, false_alarms, paraphrases = rates
        for rate in rates:
            if rate is not None and not (
                is_count(rate.texts, 1) and is_count(rate.flagged) and rate.flagged <= rate.texts
            ):
                raise ValueError(
                    f"report has {asdict(rate)}; expected counts, of which flagged is no larger than texts."
                )
        if (
            recall is None
            or false_alarms is None
            or not isinstance(source, str)
            or not (asked is None or is_recall(asked))
        ):
            raise ValueError(f"report is {data!r:.200}; expected what GateReport.to_dict returns.")
        return cls(recall, false_alarms, paraphrases, source, asked)


def is_recall(value: Any) -> bool:
    """Whether a value is a number above 0 and at most 1."""
    return is_finite_number(value) and 0 < value <= 1


@dataclass(frozen=True)
class FitTexts:
    """Texts to fit a gate on, checked.

    Attributes:
        forget: forget texts.
        retain: retain texts.
        paraphrases: rewordings of forget texts; None where none were given.
    """

    forget: list[str]
    retain: list[str]
    paraphrases: list[str] | None

    @property
    def texts(self) -> list[str]:
        """Forget texts, then retain texts."""
        return self.forget + self.retain

    @property
    def is_forget(self) -> np.ndarray:
        """Whether each of `texts` is a forget text: bool."""
        return np.arange(len(self.forget) + len(self.retain)) < len(self.forget)


def checked_fit_texts(
    forget_texts: Sequence[str], retain_texts: Sequence[str], paraphrases: Sequence[str] | None, recall: float
) -> FitTexts:
    """The texts that a gate is fit on, and its recall, checked.

    Raises:
        TypeError: if a text is no string.
        ValueError: if a group has fewer than two different texts, a text to retain is in another group, there are no
            paraphrases in a list of them, or the recall is not above 0 and at most 1.
    """
    if not is_recall(recall):
        raise ValueError(f"recall={recall!r}; expected a share above 0 and at most 1, such as 0.99.")
    groups = {"forget_texts": checked_texts(forget_texts), "retain_texts": checked_texts(retain_texts)}
    different = {name: {_key(text): text for text in texts} for name, texts in groups.items()}
    for name, texts in different.items():
        if len(texts) < 2:
            raise ValueError(
                f"{name} has {len(texts)} different text(s) among {len(groups[name])}; expected at least 2 in each "
                "group, one to fit on and one to hold out, and far more for a recall that can be relied on."
            )
    reworded = None if paraphrases is None else checked_texts(paraphrases)
    if reworded == []:
        raise ValueError("paraphrases is empty; expected texts, or None.")
    retained = set(different["retain_texts"])
    for name, keys in {"forget_texts": different["forget_texts"], "paraphrases": map(_key, reworded or ())}.items():
        if both := sorted(retained.intersection(keys)):
            raise ValueError(
                f"{len(both)} texts are in {name} and in retain_texts, such as {both[0][:80]!r}; drop them from one."
            )
    return FitTexts(groups["forget_texts"], groups["retain_texts"], reworded)


def folds(given: FitTexts, seed: int) -> np.ndarray:
    """The fold in which each of `given.texts` is held out: integers (texts,), from 0.

    There are `NUM_FOLDS`, or as many as the smaller group has different texts. Each group is dealt evenly; texts that
    differ in letter case and white space only are in one fold.
    """
    draws = np.random.default_rng(seed)
    fold_of: dict[str, int] = {}
    groups = [list(dict.fromkeys(map(_key, texts))) for texts in (given.forget, given.retain)]
    num_folds = min(NUM_FOLDS, *map(len, groups))
    for keys in groups:
        fold_of.update((keys[i], place % num_folds) for place, i in enumerate(draws.permutation(len(keys))))
    return np.array([fold_of[_key(text)] for text in given.texts])


def lowest_flagged(forget_scores: np.ndarray, recall: float) -> float:
    """The highest threshold that a share of at least `recall` of the scores reaches."""
    descending = np.sort(forget_scores)[::-1]
    return float(descending[max(1, math.ceil(recall * len(descending) - 1e-9)) - 1])


def threshold_for(
    forget_scores: np.ndarray, retain_scores: np.ndarray, recall: float, fitted_scores: np.ndarray | None = None
) -> float:
    """The highest threshold at which the share of held-out forget scores that reach it is at least the recall.

    Args:
        forget_scores: scores of held-out forget texts.
        retain_scores: those of held-out retain texts.
        recall: share above 0 and at most 1.
        fitted_scores: scores of the forget texts by the gate that was fit on all of them, of which it has to flag as
            large a share. They are the lower ones where texts differ in a rare word alone, which those held out lack.

    Raises:
        ValueError: if every retain text reaches it too, so that the gate would flag everything; the message says which
            recall can be reached.
    """
    threshold = lowest_flagged(forget_scores, recall)
    if fitted_scores is not None:
        threshold = min(threshold, lowest_flagged(fitted_scores, recall))
    if (retain_scores >= threshold).all():
        reached = float((forget_scores > retain_scores.min()).mean())
        raise ValueError(
            f"a recall of {recall} cannot be reached on {len(forget_scores)} held-out forget texts: the threshold "
            f"that flags as many of them flags all of {len(retain_scores)} retain texts, too. Reached without that: "
            f"{reached:.3g}. Ask for less, give more texts of both groups, or take another kind of gate."
        )
    if recall < 1 and len(forget_scores) * (1 - recall) < 1 - 1e-9:
        logger.warning(
            "recall=%s of %d held-out forget texts is all of them, and says little about others: see the interval in "
            "the report. Expected at least %d forget texts.",
            recall,
            len(forget_scores),
            math.ceil(1 / (1 - recall) - 1e-9),
        )
    return threshold


def report_of(
    forget_flags: np.ndarray,
    retain_flags: np.ndarray,
    paraphrase_flags: np.ndarray | None,
    source: str,
    recall_asked: float | None = None,
) -> GateReport:
    """The report of flags.

    Args:
        forget_flags: of forget texts.
        retain_flags: of retain texts.
        paraphrase_flags: of rewordings; none, or None, where there are none.
        source: where the texts come from.
        recall_asked: the recall that the threshold was set for.

    Raises:
        ValueError: if there are no forget or no retain texts.
    """
    if not len(forget_flags) or not len(retain_flags):
        raise ValueError(
            f"{len(forget_flags)} forget and {len(retain_flags)} retain texts; expected at least one of each."
        )
    rates = [
        Rate(int(flags.sum()), len(flags)) if flags is not None and len(flags) else None
        for flags in (forget_flags, retain_flags, paraphrase_flags)
    ]
    recall, false_alarms, paraphrases = rates
    assert recall is not None
    assert false_alarms is not None
    return GateReport(recall, false_alarms, paraphrases, source, recall_asked)


def _key(text: str) -> str:
    return " ".join(text.casefold().split())
