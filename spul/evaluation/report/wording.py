"""Selection and wording of an evaluation's metrics."""

from __future__ import annotations

import math
from typing import Any

from ..aggregation import MetricValue
from ..attacks.inputs import WITHOUT
from ..metrics.table import metric_of
from ..results import Evaluation

MODELS = ("detached", "unlearned", "retrained")
"""Before unlearning, after it, and retrained without the forget rows."""

MODEL_LABELS = {"detached": "before (detached)", "unlearned": "after (unlearned)", "retrained": "retrained"}
MOST_SHOWN = 360  # characters of a prompt in a report
BETTER = {"low": "lower", "high": "higher", "0": "near 0"}


def where(evaluation: Evaluation, **fields: Any) -> list[MetricValue]:
    """The metric values with these fields, such as `measure="utility", model="unlearned"`."""
    return [one for one in evaluation.metrics if all(getattr(one, key) == value for key, value in fields.items())]


def first(evaluation: Evaluation, **fields: Any) -> MetricValue | None:
    """The first of `where`; None if there is none."""
    return next(iter(where(evaluation, **fields)), None)


def knowledge_name(evaluation: Evaluation, measure: str = "utility") -> str:
    """Name of the knowledge metric of a measure: `probability` if free-form, else `accuracy`.

    A free-form answer hardly ever equals the true one word for word, so its accuracy is near 0 in any case.
    """
    return "probability" if where(evaluation, measure=measure, name="probability") else "accuracy"


def under_input_attacks(evaluation: Evaluation, rows: str, model: str = "unlearned") -> list[MetricValue]:
    """A model's knowledge metric on a row set per input attack, without the no-attack control."""
    name = knowledge_name(evaluation, "input attack")
    found = where(evaluation, measure="input attack", rows=rows, name=name, model=model)
    return [one for one in found if one.attack != WITHOUT]


def worst_input_attack(evaluation: Evaluation) -> MetricValue | None:
    """The highest knowledge of test forget rows under an input attack; None without attacks."""
    return max(under_input_attacks(evaluation, "test_forget"), key=lambda one: one.value, default=None)


def value_in_words(one: MetricValue) -> str:
    """`12.3 % [10.1, 14.2]`: the value, its 95 % interval if there is one, and its note."""
    metric = metric_of(one.name)
    text = metric.digits(one.value) + (" %" if metric.unit == "%" else "")
    if not (math.isnan(one.low) or math.isnan(one.high)):
        text += f" [{metric.digits(one.low)}, {metric.digits(one.high)}]"
    return f"{text}, {one.note}" if one.note else text


def counted(one: MetricValue) -> str:
    """` (2 of 10 rows)`: the number behind a share of rows; empty for other metrics and for means over seeds."""
    if not metric_of(one.name).counts_rows or one.num_seeds > 1 or not one.num_rows or math.isnan(one.value):
        return ""
    return f" ({round(one.value * one.num_rows):,} of {one.num_rows:,} rows)"


def points(one: MetricValue, other: MetricValue) -> str:
    """`+30.0 percentage points`: the difference of two values of a metric."""
    metric = metric_of(one.name)
    difference = metric.scale * (one.value - other.value)
    return f"{difference:+.1f} percentage points" if metric.unit == "%" else f"{difference:+.3g}"


def better_in_words(one: MetricValue | None) -> str:
    """The better direction."""
    return "" if one is None else BETTER.get(one.better, one.better)


def method_in_words(evaluation: Evaluation) -> str:
    """Name of what stands between the base and the model: `"the prompt"`, `"the gate and its refusal"`, `"LoRA"`.

    Of seeds of several, or of an earlier version, which did not note it, `"the method"`.
    """
    found = {facts.get("method") for _, facts in by_seed(evaluation.facts)}
    method = found.pop() if len(found) == 1 else None
    return method if isinstance(method, str) else "the method"


def by_seed(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Settings or facts with their heading; those of each joined seed."""
    seeds = values.get("seeds")
    if isinstance(seeds, list) and seeds and all(isinstance(one, dict) for one in seeds):
        return [(f"seed {i}", one) for i, one in enumerate(seeds)]
    return [("value", values)]


def spaced(name: str) -> str:
    """A name with spaces for underscores."""
    return name.replace("_", " ")


def shown(prompt: str) -> str:
    """A prompt on one line, its middle left out if it is long."""
    if len(prompt) > MOST_SHOWN:
        prompt = f"{prompt[: MOST_SHOWN // 2]} [...] {prompt[-MOST_SHOWN // 2 :]}"
    return prompt.replace("\n", " \u21b5 ")
