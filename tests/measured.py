"""Measurements and evaluations made by hand, for tests of their aggregation."""

from __future__ import annotations

import numpy as np

from spul.evaluation.aggregation import Measurement, MetricValue
from spul.evaluation.results import Evaluation

VALUES = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
DRAWS = np.random.default_rng(0)
SCORES = {
    (model, rows): DRAWS.normal(shift if rows == "train_forget" else 0, 1, 150).tolist()
    for model, shift in (("unlearned", -1.0), ("retrained", 0.1))
    for rows in ("train_forget", "unseen")
}


def evaluate(*measurements: Measurement, **settings: object) -> Evaluation:
    return Evaluation(dict(settings), list(measurements), {})


def of(measure: str = "utility", rows: str = "test_forget", model: str = "unlearned", attack: str = "", **changes):
    return Measurement(measure, rows, model, attack, **changes)


def ends(one: MetricValue) -> tuple[float, float, float]:
    return one.value, one.low, one.high


def membership(scores: dict = SCORES, sign: int = 1) -> list[Measurement]:
    return [
        of("membership", rows, model, per_row={"loss": [sign * value for value in values]}, num_rows=len(values))
        for (model, rows), values in scores.items()
    ]
