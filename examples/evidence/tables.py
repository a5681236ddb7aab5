"""Table and figure of scored systems: forget accuracy, retain accuracy beside the base's on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from spul.evaluation.metrics.intervals import Interval, bootstrap_interval, seeds_interval

BASE = "base"
Record = dict[str, Any]


def paired(records: Sequence[Record], base: dict[int, Record]) -> tuple[Interval, list[float]]:
    """Retain accuracy less the base's on the same rows: mean and interval, and the differences by seed.

    Seeds have rows of their own. With several the interval is the wider of Student's t over the seeds and the
    bootstrap over all rows; with one it is the bootstrap's and covers no other seed.

    Raises:
        ValueError: if the base was not scored on one of the seeds.
    """
    if missing := sorted({one["seed"] for one in records} - set(base)):
        raise ValueError(f"{records[0]['system']} was scored on seeds {missing}, the base was not; score it there.")
    rows = [
        np.subtract(one["scores"]["test_retain"]["accuracy"], base[one["seed"]]["scores"]["test_retain"]["accuracy"])
        for one in records
    ]
    by_seed = [float(each.mean()) for each in rows]
    by_rows = bootstrap_interval(np.concatenate(rows))
    if len(rows) == 1:
        return by_rows, by_seed
    by_seeds = seeds_interval(by_seed)
    wider = max((by_rows, by_seeds), key=lambda one: np.nan_to_num(one.high - one.low))
    return Interval(by_seeds.estimate, wider.low, wider.high), by_seed


def table(records: Sequence[Record], systems: Sequence[str]) -> str:
    """A Markdown table of test rows: means over seeds in %, each seed's forget accuracy behind."""
    base = {one["seed"]: one for one in records if one["system"] == BASE}
    lines = [
        "| | seeds | forget | generic on forget | retain | retain - base, points | generic on retain |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in systems:
        own = sorted((one for one in records if one["system"] == name), key=lambda one: one["seed"])
        if not own:
            continue

        def values(side: str, score: str, own: list[Record] = own) -> list[float]:
            return [100 * float(np.mean(one["scores"][side][score])) for one in own]

        forget = values("test_forget", "accuracy")
        found, _ = paired(own, base)
        low, high = 100 * found.low, 100 * found.high
        change = f"{100 * found.estimate:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})")
        cells = [
            name,
            str(len(own)),
            f"{np.mean(forget):.1f} ({', '.join(f'{value:.1f}' for value in forget)})",
            f"{np.mean(values('test_forget', 'generic')):.1f}",
            f"{np.mean(values('test_retain', 'accuracy')):.1f}",
            "" if name == BASE else change,
            f"{np.mean(values('test_retain', 'generic')):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tradeoff(records: Sequence[Record], systems: Sequence[str], title: str) -> Figure:
    """Forget accuracy against what retain rows lose, every seed a point; the aim is shaded."""
    base = {one["seed"]: one for one in records if one["system"] == BASE}
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(-1, 3, ymin=0, ymax=1, color="0.93", lw=0)
    axes.axhspan(0, 5, color="0.93", lw=0)
    for i, name in enumerate(systems):
        own = [one for one in records if one["system"] == name]
        if not own:
            continue
        _, changes = paired(own, base)
        forget = [100 * float(np.mean(one["scores"]["test_forget"]["accuracy"])) for one in own]
        marker = "osD^vP*Xh<>"[i % 11]
        axes.scatter([100 * change for change in changes], forget, marker=marker, s=44, label=name, alpha=0.85)
    axes.set_xlabel("test retain accuracy less the base's (points)")
    axes.set_ylabel("test forget accuracy (%)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.25)
    return figure
