"""Conditions on the metrics of an evaluation, such as `"test_forget.accuracy.high > 0.05"`, by which a check fails."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.rows import SHOWN
from ..records.digests import digest
from ..records.fields import is_finite_number
from ..records.messages import listed
from .aggregation import Measurement, MetricValue, aggregate, seeds_by_key
from .measures import MEASURES, is_attacked, key_in_words, variant_in_words
from .metrics.table import METRICS
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
DEFAULT_MEASURE, INPUT_ATTACK = "utility", "input attack"


@dataclass(frozen=True)
class Condition:
    """A comparison of one end of a metric's interval, of the unlearned model, with a number.

    A measure that has several values of the metric, one for each attack or number of steps, meets the condition if
    one of them does. Of attacks only what was attacked counts: not the values without or before one, and of an attack
    on the input the rows whose prompt it changes.

    Args:
        measure: one of `MEASURES`.
        rows: the set of rows, such as `"test_forget"`.
        metric: such as `"accuracy"`.
        end: `"low"` or `"high"`, an end of the 95 % interval, or `"value"`, the estimate.
        comparison: `">"`, `">="`, `"<"` or `"<="`.
        number: what it is compared with.

    Raises:
        ValueError: if measure, metric, end or comparison is another, or the number is not finite, or no value of the
            metric, as 5 of a share.
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
        if self.metric not in METRICS:
            near = difflib.get_close_matches(self.metric, METRICS, cutoff=0.5) or list(METRICS)
            raise ValueError(f"{self}: there is no metric {self.metric!r}; expected such as {', '.join(near)}.")
        if self.end not in ENDS:
            raise ValueError(f"{self}: {self.end!r} is no end of an interval; expected one of {', '.join(ENDS)}.")
        if self.comparison not in COMPARISONS:
            raise ValueError(f"{self}: expected one of {', '.join(COMPARISONS)}, not {self.comparison!r}.")
        if not is_finite_number(self.number):
            raise ValueError(f"{self}: expected a finite number.")
        least, most = METRICS[self.metric].bounds
        if not least <= self.number <= most:  # the condition would never hold, or always
            raise self._out_of_bounds()

    def _out_of_bounds(self) -> ValueError:
        metric = METRICS[self.metric]
        is_percent = metric.scale == 100 and 0 < self.number <= 100
        as_share = f", and {self.number:g} % is {self.number / 100:g}" if is_percent else ""
        least, most = metric.bounds
        return ValueError(f"{self}: {self.metric} is a number from {least:g} to {most:g}{as_share}.")

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition that a text says: `"[MEASURE:] ROWS.METRIC.END COMPARISON NUMBER"`.

        Args:
            text: such as `"test_forget.accuracy.high > 0.05"`; the measure is `"utility"` unless named, its name with
                spaces or hyphens.

        Raises:
            ValueError: if it says none, or one that never holds or always, as `> 1` of a share.
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
        condition = cls(**{**parts, "measure": measure}, number=number)
        least, most = METRICS[condition.metric].bounds
        if (condition.comparison, number) in ((">", most), ("<=", most), ("<", least), (">=", least)):
            raise condition._out_of_bounds()
        return condition

    def __str__(self) -> str:
        before = "" if self.measure == DEFAULT_MEASURE else f"{self.measure}: "
        return f"{before}{self.rows}.{self.metric}.{self.end} {self.comparison} {self.number:g}"

    def met_by(self, evaluation: Evaluation) -> list[MetricValue]:
        """The values of an evaluation that meet the condition; none if it is not met.

        Raises:
            ValueError: if the evaluation has no such metric, or no value that meets the condition and one without the
                end that is asked for, or lacks it for an attack under which the model has diverged: what was not
                measured, or has diverged, is not good. Also if an earlier version of spul measured attacks on the
                input, which did not note the rows that they change.
        """
        counted = _counted(evaluation, self.measure)
        found = [one for one in counted if (one.rows, one.name) == (self.rows, self.metric)]
        if not found:
            there = sorted({f"{one.rows}.{one.name}" for one in counted})
            starts = (self.measure, f"{self.metric} of {self.measure}")
            reasons = [why for name, why in evaluation.skipped.items() if name.startswith(starts)]
            why = f" ({listed(list(dict.fromkeys(reasons)), SHOWN)})" if reasons else ""
            raise ValueError(
                f"{self}: the evaluation has no {self.rows}.{self.metric} of {self.measure!r}; it has "
                f"{', '.join(there) or 'nothing of it'}{why}."
            )
        if met := [one for one in found if COMPARISONS[self.comparison](getattr(one, self.end), self.number)]:
            return met
        if unknown := [one for one in found if math.isnan(getattr(one, self.end))]:
            raise ValueError(
                f"{self}: {_named(unknown[0])} has no {self.end}, only the value {unknown[0].value:g}; compare that."
            )
        start = f"{self.measure} {self.rows} unlearned"
        names = (start, f"{self.metric} of {start}")  # the latter where some of joined seeds lack the metric alone
        missing = {
            name: why
            for name, why in evaluation.skipped.items()
            if name in names or name.startswith(tuple(f"{one} " for one in names))
        }
        if missing:
            name, why = next(iter(missing.items()))
            raise ValueError(f"{self}: {name} has no value ({why}), so it is not known whether the condition holds.")
        return []


def failures(evaluation: Evaluation, conditions: Sequence[Condition]) -> list[str]:
    """A line for each value of an evaluation that meets one of the conditions by which it fails.

    Raises:
        ValueError: as of `Condition.met_by`.
    """
    return [f"{condition}: {_found(one)}" for condition in conditions for one in condition.met_by(evaluation)]


def _counted(evaluation: Evaluation, measure: str) -> list[MetricValue]:
    """The unlearned model's values of a measure that a condition compares."""
    found = [
        one for one in evaluation.metrics if (one.measure, one.model) == (measure, "unlearned") and is_attacked(one)
    ]
    if measure != INPUT_ATTACK:
        return found
    measured = [
        one
        for one in evaluation.measurements
        if (one.measure, one.model) == (measure, "unlearned") and is_attacked(one.key)
    ]
    if old := next((one for one in measured if "changed" not in one.per_row), None):
        raise ValueError(
            f"{key_in_words(old.key)} was measured by an earlier version of spul, which did not note the rows that an "
            "attack changes; evaluate again, in another folder."
        )
    by_key = seeds_by_key(measured)
    partial = {key: seeds for key, seeds in by_key.items() if not all(all(one.per_row["changed"]) for one in seeds)}
    whole = [one for one in found if one.key not in partial]
    return whole + [value for seeds in partial.values() for value in _of_changed_rows(seeds)]


def _of_changed_rows(seeds: Sequence[Measurement]) -> list[MetricValue]:
    """The metrics of an attack on the input over the rows that it changes, of the seeds where it changes some."""
    kept, of = [], ""
    for one in seeds:
        changed = np.asarray(one.per_row["changed"], dtype=bool)
        if not changed.any():
            continue
        per_row = {name: np.asarray(values)[changed].tolist() for name, values in one.per_row.items()}
        part = digest([one.digest, changed.tolist()])
        kept.append(dataclasses.replace(one, per_row=per_row, num_rows=int(changed.sum()), digest=part))
        of = of or f"{changed.sum():,} of {one.num_rows:,}"
    return [dataclasses.replace(one, note=f"over the {of} rows that it changes") for one in aggregate(kept)]


def _found(one: MetricValue) -> str:
    return f"{_named(one)} is {one.value:g} [{one.low:g}, {one.high:g}]" + (f", {one.note}" if one.note else "")


def _named(one: MetricValue) -> str:
    variant = variant_in_words(one)
    return f"{one.rows}.{one.name}" + (f" ({variant})" if variant else "")
