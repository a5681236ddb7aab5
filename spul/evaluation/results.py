"""The outcome of an evaluation: saved, loaded, and joined over seeds."""

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
from .aggregation import Measurement, MetricValue, aggregate, seeds_by_key
from .measures import key_in_words

EVALUATION_NAME = "evaluation.json"
MEASUREMENTS_NAME = "measurements.jsonl"
# Settings in which the seeds of one experiment may differ: models and rows, by their digests, and library versions.
OF_ONE_SEED = ("seed", "models", "names", "rows", "unrelated_texts", "questions", "versions")


@dataclass(repr=False)
class Evaluation:
    """The outcome of `spul.evaluate`, or of several joined.

    Attributes:
        settings: models (by their digests), counts of rows, and settings of the evaluation.
        measurements: scores per row.
        skipped: what was not measured, and why.
        metrics: metrics with confidence intervals; aggregated from the measurements unless given.
        facts: adapter, base and rows that were measured (`facts_of`), which the report names.
    """

    settings: dict[str, Any]
    measurements: list[Measurement]
    skipped: dict[str, str]
    metrics: list[MetricValue] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.metrics:
            self.metrics = aggregate(self.measurements)

    def __repr__(self) -> str:
        measures = list(dict.fromkeys(one.measure for one in self.metrics))
        return (
            f"Evaluation({len(self.metrics)} metrics of {', '.join(measures)}; models: {', '.join(self.models)}; "
            f"skipped: {', '.join(self.skipped) or 'nothing'})"
        )

    @property
    def models(self) -> list[str]:
        """The names of the models, the unlearned one first."""
        return list(dict.fromkeys(one.model for one in self.measurements))

    def metric(
        self,
        measure: str,
        rows: str,
        name: str,
        model: str = "unlearned",
        attack: str = "",
        level: int | None = None,
    ) -> MetricValue:
        """One metric value, by the fields of `MetricValue`.

        Raises:
            KeyError: if there is none.
        """
        wanted = (rows, name, model, attack, level)
        of_measure = [one for one in self.metrics if one.measure == measure]
        present = {(one.rows, one.name, one.model, one.attack, one.level): one for one in of_measure}
        if wanted in present:
            return present[wanted]
        there = f"of {measure!r} there are {sorted(present, key=str)}"
        if not present:
            there = f"the measures are {list(dict.fromkeys(one.measure for one in self.metrics))}"
        raise KeyError(
            f"there is no {name!r} of measure={measure!r}, rows={rows!r}, model={model!r}, attack={attack!r}, "
            f"level={level!r}; {there}"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write `evaluation.json` (facts, settings, metrics) and `measurements.jsonl` (per row) into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_measurements(path / MEASUREMENTS_NAME, self.measurements)
        record = {
            "facts": self.facts,
            "settings": self.settings,
            "skipped": self.skipped,
            "metrics": [dataclasses.asdict(one) for one in self.metrics],
        }
        text = json.dumps(_to_json(record), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(path / EVALUATION_NAME, text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Evaluation:
        """Read the files of `save`.

        Raises:
            FileNotFoundError: if the folder has no finished evaluation.
            ValueError: if its file lacks fields of this version.
        """
        path = Path(folder)
        if not (path / EVALUATION_NAME).exists():
            raise FileNotFoundError(
                f"{path} has no {EVALUATION_NAME}; run spul.evaluate(..., output_dir=...) to its end."
            )
        record = json.loads((path / EVALUATION_NAME).read_text(encoding="utf-8"))
        if missing := [name for name in ("facts", "settings", "metrics", "skipped") if name not in record]:
            raise ValueError(
                f"{path / EVALUATION_NAME} has no {', '.join(missing)}, only {sorted(record)}: it was written by "
                "another version of spul, or is not an evaluation. Evaluate again, in another folder."
            )
        if any("level" not in one for one in record["metrics"]):
            raise ValueError(
                f"{path / EVALUATION_NAME} was written by another version of spul; evaluate again, in another folder."
            )
        metrics = [
            MetricValue(**one | {end: _from_json(one[end]) for end in ("value", "low", "high")})
            for one in record["metrics"]
        ]
        measurements = read_measurements(path / MEASUREMENTS_NAME)
        facts = _without_own_examples(record["facts"], record["settings"])
        return cls(record["settings"], measurements, record["skipped"], metrics, facts)


def join(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several seeds of one experiment: means, with intervals that count the seeds.

    Where all seeds were measured on the same rows, intervals of means are over rows and seeds (`joined_interval`).
    Otherwise, and for metrics that exist once per seed, they are over the seeds alone (`seeds_interval`). Shares that
    are 0 or 1 under every seed, and shares of rows without per-row scores that are alike under every seed, have
    Wilson's interval over the rows, each counted once. Measurements that some seeds lack are listed in `skipped`.

    Args:
        evaluations: evaluations with the same measures, models and attacks, and with the same settings except for
            seed, models, rows, questions, texts and versions of libraries. A setting that one of them lacks, since an
            earlier version saved it, is not compared.

    Raises:
        TypeError: if one is no `Evaluation`.
        ValueError: if there are none, they have no measurement in common, or their settings differ.
    """
    if not evaluations:
        raise ValueError("evaluations is empty; pass at least one.")
    if strange := [one for one in evaluations if not isinstance(one, Evaluation)]:
        raise TypeError(
            f"evaluations holds {strange[0]!r:.80}; expected what spul.evaluate returns, or Evaluation.load(folder)."
        )
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
    skipped = {name: why for evaluation in evaluations for name, why in evaluation.skipped.items()}
    for key in sorted(set.union(*keys) - in_all, key=key_in_words):
        name, num = key_in_words(key), sum(key in found for found in keys)
        skipped[name] = f"of {num} of {len(keys)} seeds only" + (f"; {skipped[name]}" if name in skipped else "")
    for key, seeds in seeds_by_key(measurements).items():
        names: list[set[str]] = [{*one.per_row, *one.overall} for one in seeds]
        for name in sorted(names[0].union(*names) - names[0].intersection(*names)):
            num = sum(name in some for some in names)
            skipped[f"{name} of {key_in_words(key)}"] = f"of {num} of {len(seeds)} seeds only"
    facts = {"seeds": [evaluation.facts for evaluation in evaluations]}
    return Evaluation(settings, measurements, skipped, facts=facts)


def _without_own_examples(facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Facts without examples of attacks by the user's functions, which an earlier version stored, rows and all."""
    if "seeds" in facts:
        pairs = zip(facts["seeds"], settings["seeds"], strict=True)
        return {**facts, "seeds": [_without_own_examples(*pair) for pair in pairs]}
    if not (examples := facts.get("attack_examples")):
        return facts
    has_own = (settings.get("attacks") or {}).get("inputs") is not None
    kept = {} if has_own else {name: text for name, text in examples.items() if name != "paraphrase"}
    return {**facts, "attack_examples": kept}


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that differ, each with its values; those of attacks one by one."""
    flat = []
    for one in json.loads(json.dumps(settings)):  # as loaded: tuples are lists
        attacks = one.pop("attacks", None) or {}
        shared = {name: value for name, value in one.items() if name not in OF_ONE_SEED}
        flat.append(shared | {f"attacks.{name}": value for name, value in attacks.items()})
    found = []
    for name in dict.fromkeys(name for one in flat for name in one):
        values = [one[name] for one in flat if name in one]
        if any(value != values[0] for value in values):
            found.append(f"{name} ({', '.join(map(repr, values))})")
    return found


def read_measurements(path: Path) -> list[Measurement]:
    """Measurements from a JSON Lines file; [] if it is missing. An incomplete last line is skipped.

    Raises:
        ValueError: if another line is no JSON, or one is no measurement.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise ValueError(f"line {i + 1} of {path} is no JSON, and not the last; remove the file.") from None
            break
        try:
            per_row = {name: [_from_json(value) for value in values] for name, values in record["per_row"].items()}
            overall = {name: _from_json(value) for name, value in record["overall"].items()}
            found.append(Measurement(**record | {"per_row": per_row, "overall": overall}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {i + 1} of {path} is no measurement of spul.evaluate ({type(error).__name__}: {error}): the "
                "file is damaged, or another program's. Remove it, or give another folder."
            ) from error
    return found


def append_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """Append JSON lines to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(measurements))


def write_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """Write a file of JSON lines atomically."""
    write_text(path, _lines(measurements))


def _lines(measurements: Sequence[Measurement]) -> str:
    records = (_to_json(dataclasses.asdict(one)) for one in measurements)
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _to_json(value: Any) -> Any:
    """Plain JSON values: null for NaN, a text for infinity."""
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
