"""Markdown tables of stored runs: means over seeds, published rows, costs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paper.published import PublishedRow
from spul.data import SPLITS

Run = Mapping[str, Any]
"""A stored run: `dataset`, `model`, `method`, `trainable`, `seed`, `settings`, `scores` (per split) and `cost`."""

SHARES = {"accuracy": "Accuracy", "f1": "F1", "generic": "Share of generic answers"}
"""Metrics from 0 to 1, shown in %."""


@dataclass(frozen=True)
class Summary:
    """Mean over seeds and sample standard deviation (None with one seed)."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed.

    Args:
        key: their common values by the names of the grouping.
        seeds: in the order of the runs.
        scores: summaries by split and measure.
        cost: summaries by name.
    """

    key: dict[str, Any]
    seeds: tuple[int, ...]
    scores: dict[str, dict[str, Summary]]
    cost: dict[str, Summary]


def read_runs(path: str | Path) -> list[dict[str, Any]]:
    """Read stored runs: JSON lines, one object a run.

    An incomplete last line, which an interrupted write leaves, is skipped with a warning.

    Raises:
        ValueError: if another line is not a JSON object.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    runs = []
    for number, line in enumerate([*lines, rest], start=1):
        if not line.strip():
            continue
        try:
            run = json.loads(line)
        except ValueError as error:  # a character of several bytes can be broken, too
            if number > len(lines):
                warnings.warn(f"{path}, line {number} breaks off and is skipped; run it again.", stacklevel=2)
                continue
            raise ValueError(f"{path}, line {number} is not JSON: {error}. Mend or remove the line.") from error
        if not isinstance(run, dict):
            raise ValueError(f"{path}, line {number} is {type(run).__name__} {run!r}; expected an object, one a run.")
        runs.append(run)
    return runs


def partition(runs: Iterable[Run], by: Sequence[str]) -> list[tuple[dict[str, Any], list[Run]]]:
    """Groups of runs with equal values of some keys, in the order first seen.

    Args:
        runs: stored runs.
        by: keys of a run or of its settings.

    Raises:
        ValueError: if there are no runs, or one has no such key.
    """
    parts: dict[tuple[Any, ...], tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        key = {name: _value(run, name) for name in by}
        same = tuple(json.dumps(v, sort_keys=True) if isinstance(v, list | dict) else v for v in key.values())
        parts.setdefault(same, (key, []))[1].append(run)
    if not parts:
        raise ValueError("there are no runs; expected at least one.")
    return list(parts.values())


def aggregate(runs: Iterable[Run], by: Sequence[str] = ("method",)) -> list[Group]:
    """Mean and sample standard deviation over seeds of every score and cost; groups in the order first seen.

    Args:
        runs: stored runs.
        by: keys of a run or of its settings; runs with equal values make a group.

    Raises:
        ValueError: if there are no runs, one lacks a key, two of a group have the same seed (they differ in a
            key that is not in `by`, or are equal), or a score or cost is missing for some seeds only.
    """
    groups = []
    for key, members in partition(runs, by):
        seen: dict[int, Run] = {}
        for run in members:
            seed = _value(run, "seed")
            if seed in seen:
                raise ValueError(_same_seed(key, seed, seen[seed], run))
            seen[seed] = run
        name, seeds = _name(key), tuple(seen)
        groups.append(
            Group(
                key,
                seeds,
                scores={
                    split: _summaries([run["scores"].get(split, {}) for run in members], f"{name}, {split}", seeds)
                    for split in dict.fromkeys(split for run in members for split in _value(run, "scores"))
                },
                cost=_summaries([run.get("cost", {}) for run in members], f"{name}, cost", seeds),
            )
        )
    return groups


def score_table(
    runs: Sequence[Run],
    measure: str = "accuracy",
    by: Sequence[str] = ("method",),
    published: Sequence[PublishedRow] = (),
) -> str:
    """Markdown tables of a measure on the four splits, `mean ± standard deviation`; one per data set and model.

    Args:
        runs: stored runs.
        measure: `accuracy`, `f1` or `generic`, shown in %, or another score, shown as it is.
        by: what makes a row: keys of a run or of its settings, such as `("alpha", "beta")` for an ablation or
            `("model",)` for a comparison of models, which then share a table.
        published: rows to show below; each table takes those of its data set. With the measures accuracy and F1 only.

    Raises:
        ValueError: as in `aggregate`; if no run has the measure; if published rows meet another measure.
    """
    if published and measure not in ("accuracy", "f1"):
        raise ValueError(f"measure={measure!r}, but the published rows are of accuracy and f1; leave them out.")
    tables = []
    for common, members in partition(runs, [key for key in ("dataset", "model") if key not in by]):
        groups = aggregate(members, by)
        found = sorted({name for group in groups for scores in group.scores.values() for name in scores})
        if measure not in found:
            raise ValueError(f"measure={measure!r} is in no run of {_name(common)}; there are {', '.join(found)}.")
        rows = [[*_shown(group.key), *(_score(group, split, measure) for split in SPLITS)] for group in groups]
        datasets = {run["dataset"] for run in members}
        shown = [row for row in published if row.dataset in datasets]
        for row in shown:
            of = (row.dataset, row.model, row.method)[0 if "dataset" in by else 1 :]
            label = f"*published: {', '.join(of)}*"
            settings = ["" if name not in row.settings else f"*{row.settings[name]}*" for name in by[1:]]
            rows.append([label, *settings, *(f"*{value:.2f}*" for value in getattr(row, measure))])
        title = f"{SHARES[measure]} in %" if measure in SHARES else measure.capitalize()
        if any(len(group.seeds) > 1 for group in groups):
            title += ", mean ± standard deviation"
        caption = _caption(title, common, groups)
        if shown:
            caption += f" Published: {', '.join(dict.fromkeys(row.source for row in shown))}."
        tables.append(_table(caption, by, [split.replace("_", " ") for split in SPLITS], rows))
    return "\n".join(tables)


def main_table(runs: Sequence[Run], published: Sequence[PublishedRow] = ()) -> str:
    """Markdown tables of accuracy in %, a row per method; see `score_table`."""
    return score_table(runs, published=published)


def generic_table(runs: Sequence[Run]) -> str:
    """Markdown tables of the share of generic answers in %, a row per method; see `score_table`."""
    return score_table(runs, "generic")


def cost_table(runs: Sequence[Run], by: Sequence[str] = ("method",)) -> str:
    """Markdown tables of the costs of runs, means over seeds; one per data set and model.

    Args:
        runs: stored runs.
        by: what makes a row, as in `score_table`.

    Raises:
        ValueError: as in `aggregate`.
    """
    columns = {
        "trainable parameters": ("trainable_parameters", 1.0, ",.0f"),
        "seconds": ("seconds", 1.0, ",.1f"),
        "peak memory, MB": ("peak_memory_bytes", 1e6, ",.0f"),
        "forward passes": ("forward_passes", 1.0, ",.0f"),
    }
    tables = []
    for common, members in partition(runs, [key for key in ("dataset", "model") if key not in by]):
        groups = aggregate(members, by)
        rows = [
            [*_shown(group.key)]
            + [
                f"{group.cost[k].mean / unit:{digits}}" if k in group.cost else "-"
                for k, unit, digits in columns.values()
            ]
            for group in groups
        ]
        tables.append(_table(_caption("Cost, mean", common, groups), by, list(columns), rows))
    return "\n".join(tables)


def _value(run: Run, key: str) -> Any:
    """A key of a run or of its settings."""
    settings = run.get("settings", {})
    if key in run:
        return run[key]
    if key not in settings:
        what = ", ".join(str(run.get(name)) for name in ("dataset", "model", "method", "seed"))
        raise ValueError(
            f"a run ({what}) has no {key!r}; it has {sorted(run)} and the settings {sorted(settings)}. Leave out the "
            "runs that do not have it."
        )
    return settings[key]


def _summaries(records: Sequence[Mapping[str, Any]], where: str, seeds: Sequence[int]) -> dict[str, Summary]:
    """Mean and standard deviation of every number; what is None counts as not there."""
    summaries = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if record.get(name) is not None]
        if values and len(values) < len(records):
            lacking = [seed for seed, record in zip(seeds, records, strict=True) if record.get(name) is None]
            raise ValueError(
                f"{where}: {name} is missing for the seed(s) {lacking} and there for others, so that no mean over "
                "all seeds can be had. Leave out those runs, or run them again."
            )
        if values:
            with np.errstate(invalid="ignore"):  # a diverged run has a loss of NaN or infinity, and shows it
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
                summaries[name] = Summary(float(np.mean(values)), sd)
    return summaries


def _same_seed(key: dict[str, Any], seed: int, one: Run, other: Run) -> str:
    apart = []
    for first, second in ((one, other), (one.get("settings", {}), other.get("settings", {}))):
        names = [*first, *(name for name in second if name not in first)]
        apart += [n for n in names if n not in ("settings", "scores", "cost") and first.get(n) != second.get(n)]
    advice = f"They differ in {', '.join(apart)}: add that to by, or" if apart else "They have the same settings:"
    return f"two runs of {_name(key)} have seed {seed}. {advice} leave one of them out."


def _name(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in key.items()) or "all runs"


def _shown(key: Mapping[str, Any]) -> list[str]:
    """A group's key as cells; what is None stays empty."""
    return ["" if value is None else str(value).replace("|", "\\|") for value in key.values()]


def _score(group: Group, split: str, measure: str) -> str:
    summary = group.scores.get(split, {}).get(measure)
    if summary is None:
        return "-"
    scale, digits = (100, 2) if measure in SHARES else (1, 4)
    text = f"{scale * summary.mean:.{digits}f}"
    return text if summary.sd is None else f"{text} ± {scale * summary.sd:.{digits}f}"


def _caption(title: str, common: Mapping[str, Any], groups: Sequence[Group]) -> str:
    """Title, data set, model and seeds; the rows that lack some of the seeds are named with theirs."""
    every = sorted({seed for group in groups for seed in group.seeds})
    seeds = f"seed{'s' if len(every) > 1 else ''} {', '.join(map(str, every))}"
    fewer = [group for group in groups if len(group.seeds) < len(every)]
    if fewer:
        their = (f"{_name(group.key)}: {', '.join(map(str, sorted(group.seeds)))}" for group in fewer)
        seeds += f" (but {'; '.join(their)})"
    return "; ".join([title, *map(str, common.values()), seeds]) + "."


def _table(caption: str, by: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[name.replace("_", " ") for name in by] + list(columns), ["---"] * len(by) + ["---:"] * len(columns)]
    return f"{caption}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in [*lines, *rows])
