"""Conditions on the metrics of an evaluation, such as `"test_forget.accuracy.high > 0.05"`, by which a check fails."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .aggregation import MetricValue
from .measures import MEASURES, variant_in_words
from .results import Evaluation

ENDS = ("low", "value", "high")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
SHAPE = re.compile(
    r"\s*(?:(?P<measure>[^:<>=]+?)\s*:)?\s*(?P<rows>[^.:<>=]+)\.(?P<metric>[^.<>=]+)\.(?P<end>\w+)"
    r"\s*(?P<comparison>>=|<=|>|<)\s*(?P<number>\S+)\s*"
)
EXAMPLE = "'test_forget.accuracy.high > 0.05' or 'input attack: test_forget.accuracy.high > 0.2'"
DEFAULT_MEASURE = "utility"


@dataclass(frozen=True)
class Condition:
    """A comparison of one end of a metric's interval, of the unlearned model, with a number.

    A measure that has several values of the metric, one for each attack or number of steps, meets the condition if
    one of them does.

    Args:
        measure: one of `MEASURES`.
        rows: the set of rows, such as `"test_forget"`.
        metric: such as `"accuracy"`.
        end: `"low"` or `"high"`, an end of the 95 % interval, or `"value"`, the estimate.
        comparison: `">"`, `">="`, `"<"` or `"<="`.
        number: what it is compared with.

    Raises:
        ValueError: if measure, end or comparison is another, or the number is not finite.
    """

    measure: str
    rows: str
    metric: str
    end: str
    comparison: str
    number: float

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"{self}: there is no measure {self.measure!r}; expected one of {', '.join(MEASURES)}.")
        if self.end not in ENDS:
            raise ValueError(f"{self}: {self.end!r} is no end of an interval; expected one of {', '.join(ENDS)}.")
        if self.comparison not in COMPARISONS:
            raise ValueError(f"{self}: expected one of {', '.join(COMPARISONS)}, not {self.comparison!r}.")
        if not math.isfinite(self.number):
            raise ValueError(f"{self}: expected a finite number.")

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition that a text says: `"[MEASURE:] ROWS.METRIC.END COMPARISON NUMBER"`.

        Args:
            text: such as `"test_forget.accuracy.high > 0.05"`; the measure is `"utility"` unless named, its name with
                spaces or hyphens.

        Raises:
            ValueError: if it says none.
        """
        found = SHAPE.fullmatch(text)
        if found is None:
            raise ValueError(f"the condition {text!r} cannot be read; expected such as {EXAMPLE}.")
        parts = {name: (value or "").strip() for name, value in found.groupdict().items()}
        try:
            number = float(parts.pop("number"))
        except ValueError:
            raise ValueError(f"the condition {text!r} ends in no number; expected such as {EXAMPLE}.") from None
        measure = parts["measure"].replace("-", " ") or DEFAULT_MEASURE
        return cls(**{**parts, "measure": measure}, number=number)

    def __str__(self) -> str:
        before = "" if self.measure == DEFAULT_MEASURE else f"{self.measure}: "
        return f"{before}{self.rows}.{self.metric}.{self.end} {self.comparison} {self.number:g}"

    def met_by(self, evaluation: Evaluation) -> list[MetricValue]:
        """The values of an evaluation that meet the condition; none if it is not met.

        Raises:
            ValueError: if the evaluation has no such metric, or one without the end that is asked for: what was not
                measured, or has diverged, is not good.
        """
        of_model = [one for one in evaluation.metrics if one.model == "unlearned"]
        found = [
            one for one in of_model if (one.measure, one.rows, one.name) == (self.measure, self.rows, self.metric)
        ]
        if not found:
            there = sorted({f"{one.rows}.{one.name}" for one in of_model if one.measure == self.measure})
            why = evaluation.skipped.get(self.measure, "")
            raise ValueError(
                f"{self}: the evaluation has no {self.rows}.{self.metric} of {self.measure!r}; it has "
                f"{', '.join(there) or 'nothing of it'}{f' ({why})' if why else ''}."
            )
        if unknown := [one for one in found if math.isnan(getattr(one, self.end))]:
            raise ValueError(
                f"{self}: {_named(unknown[0])} has no {self.end}, only the value {unknown[0].value:g}; compare that."
            )
        return [one for one in found if COMPARISONS[self.comparison](getattr(one, self.end), self.number)]


def failures(evaluation: Evaluation, conditions: Sequence[Condition]) -> list[str]:
    """A line for each value of an evaluation that meets one of the conditions by which it fails.

    Raises:
        ValueError: as of `Condition.met_by`.
    """
    return [
        f"{condition}: {_named(one)} is {one.value:g} [{one.low:g}, {one.high:g}]"
        for condition in conditions
        for one in condition.met_by(evaluation)
    ]


def _named(one: MetricValue) -> str:
    variant = variant_in_words(one)
    return f"{one.rows}.{one.name}" + (f" ({variant})" if variant else "")
