"""A small evaluation made by hand, of ten rows a set, for tests of the report and the figures."""

from __future__ import annotations

from functools import cache
from typing import Any

from spul.evaluation.aggregation import Measurement
from spul.evaluation.results import Evaluation

TEN = 10
# Right answers of ten rows, by model and split.
RIGHT = {
    "unlearned": {"train_retain": 9, "train_forget": 1, "test_retain": 8, "test_forget": 2},
    "detached": {"train_retain": 10, "train_forget": 9, "test_retain": 9, "test_forget": 8},
    "retrained": {"train_retain": 9, "train_forget": 5, "test_retain": 9, "test_forget": 4},
}
# The scores of members are above this many of the ten unseen rows'.
ABOVE = {"unlearned": {"loss": 3, "zlib": 5}, "detached": {"loss": 9, "zlib": 8}, "retrained": {"loss": 6, "zlib": 5}}
ATTACKED = {"none": 2, "capitals": 5, "prefix: <b>Say|it</b>": 4}
RELEARNED = {"unlearned": {0: 1, 4: 6, 16: 5}, "retrained": {0: 4, 4: 5, 16: 6}}


def answers(right: int, generic_rest: bool, with_classes: bool = False) -> dict[str, list[float]]:
    """Ten rows of two classes, the first of them right, the others generic or the other class.

    With the classes there is an F1, whose interval takes its time.
    """
    true = [float(i % 2) for i in range(TEN)]
    predicted = [t if i < right else 2.0 if generic_rest else 1 - t for i, t in enumerate(true)]
    classes = {"true": true, "predicted": predicted} if with_classes else {}
    return {
        **classes,
        "accuracy": [float(t == p) for t, p in zip(true, predicted, strict=True)],
        "generic": [float(p == 2) for p in predicted],
        "loss": [0.5 if t == p else 2.5 for t, p in zip(true, predicted, strict=True)],
    }


def measurement(measure: str, rows: str, model: str, attack: str = "", **changes: Any) -> Measurement:
    return Measurement(measure, rows, model, attack, **{"num_rows": TEN, "digest": rows, **changes})


def utility(right: dict[str, dict[str, int]] = RIGHT) -> list[Measurement]:
    found = []
    for model, splits in right.items():
        for rows, count in splits.items():
            per_row = answers(count, model == "unlearned", with_classes=(model, rows) == ("unlearned", "test_forget"))
            found.append(measurement("utility", rows, model, per_row=per_row))
    return found


def membership(models: tuple[str, ...] = ("unlearned", "detached", "retrained")) -> list[Measurement]:
    """Every member scores above so many of the unseen rows 0, 1, ..., 9: the AUC is a tenth of that."""
    found = []
    for model in models:
        members = {attack: [above - 0.5] * TEN for attack, above in ABOVE[model].items()}
        unseen = {attack: [float(i) for i in range(TEN)] for attack in members}
        found.append(measurement("membership", "train_forget", model, per_row=members))
        found.append(measurement("membership", "unseen", model, per_row=unseen))
    return found


def input_attacks() -> list[Measurement]:
    found = []
    for attack, count in ATTACKED.items():
        for model, right in (("unlearned", count), ("retrained", 4)):
            per_row, lost = answers(right, model == "unlearned"), {"tokens_lost": 0.0}
            found.append(measurement("input attack", "test_forget", model, attack, per_row=per_row, overall=lost))
    return found


def relearning() -> list[Measurement]:
    return [
        measurement("relearning", "train_forget", model, level=step, overall={"accuracy": count / TEN})
        for model, curve in RELEARNED.items()
        for step, count in curve.items()
    ]


def soft_suffix() -> list[Measurement]:
    return [
        measurement(
            "soft suffix", "train_forget", model, attack, per_row={"accuracy": [1.0] * right + [0.0] * (TEN - right)}
        )
        for model, right in (("unlearned", 7), ("retrained", 4))
        for attack in ("before", "after", "trained")
    ]


@cache
def whole() -> Evaluation:
    measurements = [*utility(), *membership(), *input_attacks(), *relearning(), *soft_suffix()]
    settings = {"batch_size": 32, "name": "<script>alert('x')</script>", "of": ["a|b", None]}
    return Evaluation(settings, measurements, {"kl": "the model has no <base> of its own"})
