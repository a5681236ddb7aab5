"""The outcome of an evaluation: kept, read again, and joined over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.files import write_text
from .aggregation import Measurement, Number, name_of_key, numbers_of

EVALUATION_NAME = "evaluation.json"
MEASUREMENTS_NAME = "measurements.jsonl"
# Settings that seeds of one experiment need not share: which models and rows, by their digests, and with what made.
OF_ONE_SEED = ("seed", "models", "names", "rows", "unrelated_texts", "questions", "versions")


@dataclass(repr=False)
class Evaluation:
    """The outcome of `spul.evaluate`, or of several joined.

    Attributes:
        settings: what was evaluated, and how.
        measurements: what was measured.
        left_out: what was not measured, and why.
        numbers: what it amounts to.
    """

    settings: dict[str, Any]
    measurements: list[Measurement]
    left_out: dict[str, str]
    numbers: list[Number] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.numbers:
            self.numbers = numbers_of(self.measurements)

    def __repr__(self) -> str:
        measures = list(dict.fromkeys(one.measure for one in self.numbers))
        return (
            f"Evaluation({len(self.numbers)} numbers of {', '.join(measures)}; models: {', '.join(self.models)}; left "
            f"out: {', '.join(self.left_out) or 'nothing'})"
        )

    @property
    def models(self) -> list[str]:
        """The models, the unlearned one first."""
        return list(dict.fromkeys(one.model for one in self.measurements))

    def number(self, measure: str, rows: str, name: str, model: str = "unlearned", variant: str = "") -> Number:
        """One of the numbers.

        Raises:
            KeyError: if there is none such.
        """
        for one in self.numbers:
            if (one.measure, one.rows, one.name, one.model, one.variant) == (measure, rows, name, model, variant):
                return one
        of_measure = {(one.rows, one.name, one.model, one.variant) for one in self.numbers if one.measure == measure}
        there = f"of {measure!r} there are {sorted(of_measure)}"
        if not of_measure:
            there = f"the measures are {list(dict.fromkeys(one.measure for one in self.numbers))}"
        raise KeyError(
            f"there is no {name!r} of measure={measure!r}, rows={rows!r}, model={model!r}, variant={variant!r}; "
            f"{there}"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write `evaluation.json` (settings and numbers) and `measurements.jsonl` (per row) into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_measurements(path / MEASUREMENTS_NAME, self.measurements)
        record = {
            "settings": self.settings,
            "left_out": self.left_out,
            "numbers": [dataclasses.asdict(one) for one in self.numbers],
        }
        text = json.dumps(_to_json(record), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(path / EVALUATION_NAME, text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if the folder has no finished evaluation.
        """
        path = Path(folder)
        if not (path / EVALUATION_NAME).exists():
            raise FileNotFoundError(
                f"{path} has no {EVALUATION_NAME}; run spul.evaluate(..., output_dir=...) to its end."
            )
        record = json.loads((path / EVALUATION_NAME).read_text(encoding="utf-8"))
        numbers = [
            Number(**one | {end: _from_json(one[end]) for end in ("value", "low", "high")})
            for one in record["numbers"]
        ]
        return cls(record["settings"], read_measurements(path / MEASUREMENTS_NAME), record["left_out"], numbers)


def join(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several seeds of one experiment made one: means, with intervals that count the seeds.

    Where all seeds were measured on the same rows, intervals of means are over rows and seeds (`joined_interval`);
    else, and for numbers that exist once per seed, over the seeds alone (`seeds_interval`). Shares that are 0 or 1
    under every seed, and those that are known as shares only and alike, have Wilson's interval over the rows, each
    counted once. What some seeds lack stands in `left_out`.

    Args:
        evaluations: with the same measures, models and attacks, and with the same settings but for seed, models, rows,
            questions, texts and versions of libraries. A setting that one of them does not name, as when it was saved
            by an earlier version, is not compared.

    Raises:
        ValueError: if there are none, they have no measurement in common, or their settings differ.
    """
    if not evaluations:
        raise ValueError("evaluations is empty; pass at least one.")
    keys = [{one.key for one in evaluation.measurements} for evaluation in evaluations]
    in_all = set.intersection(*keys)
    if not in_all:
        raise ValueError("no measurement is in all evaluations. Evaluate all seeds alike.")
    if other := _differing([evaluation.settings for evaluation in evaluations]):
        raise ValueError(f"evaluations have different settings: {'; '.join(other)}. Evaluate all seeds alike.")
    measurements = [
        dataclasses.replace(one, seed=seed)
        for seed, evaluation in enumerate(evaluations)
        for one in evaluation.measurements
        if one.key in in_all
    ]
    settings = {"seeds": [evaluation.settings for evaluation in evaluations]}
    left_out = {name: why for evaluation in evaluations for name, why in evaluation.left_out.items()}
    for key in sorted(set.union(*keys) - in_all):
        name, num = name_of_key(key), sum(key in found for found in keys)
        left_out[name] = f"of {num} of {len(keys)} seeds only" + (f"; {left_out[name]}" if name in left_out else "")
    return Evaluation(settings, measurements, left_out)


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Which settings differ, each with its values; attacks one by one."""
    flat = []
    for one in json.loads(json.dumps(settings)):  # as they are read again: tuples are lists
        attacks = one.pop("attacks", None) or {}
        kept = {name: value for name, value in one.items() if name not in OF_ONE_SEED}
        flat.append(kept | {f"attacks.{name}": value for name, value in attacks.items()})
    found = []
    for name in dict.fromkeys(name for one in flat for name in one):
        values = [one[name] for one in flat if name in one]
        if any(value != values[0] for value in values):
            found.append(f"{name} ({', '.join(map(repr, values))})")
    return found


def read_measurements(path: Path) -> list[Measurement]:
    """The measurements of a file of JSON lines; none without a file. A line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise ValueError(f"line {i + 1} of {path} is no JSON, and not the last; remove the file.") from None
            break
        per_row = {name: [_from_json(value) for value in values] for name, values in record["per_row"].items()}
        overall = {name: _from_json(value) for name, value in record["overall"].items()}
        found.append(Measurement(**record | {"per_row": per_row, "overall": overall}))
    return found


def append_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """As JSON lines at the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(measurements))


def write_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """As JSON lines, written whole or not at all."""
    write_text(path, _lines(measurements))


def _lines(measurements: Sequence[Measurement]) -> str:
    records = (_to_json(dataclasses.asdict(one)) for one in measurements)
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _to_json(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null and a text instead."""
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_to_json(inner) for inner in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _from_json(value: float | str | None) -> float:
    if value is None:
        return math.nan
    return float(value) if isinstance(value, str) else value
