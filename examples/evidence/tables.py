"""Tables and figures of scored systems: forget accuracy, retain accuracy beside the base's on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from spul.evaluation.metrics.intervals import Interval, bootstrap_interval, seeds_interval

BASE = "base"
# Models by their names in lines of data: name, and millions of parameters.
SIZES = {
    "small-lm": ("small-lm", 5.7),
    "SmolLM2-135M-Instruct": ("SmolLM2", 134.5),
    "smollm2": ("SmolLM2", 134.5),
    "gemma3": ("Gemma 3", 268.1),
}
Record = dict[str, Any]


def paired(records: Sequence[Record], base: dict[int, Record], part: str = "test") -> tuple[Interval, list[float]]:
    """Retain accuracy less the base's on the same rows: mean and interval, and the differences by seed.

    Seeds have rows of their own. With several the interval is the wider of Student's t over the seeds and the
    bootstrap over all rows; with one it is the bootstrap's and covers no other seed. `part` is `test` or `train`.

    Raises:
        ValueError: if the base was not scored on one of the seeds.
    """
    if missing := sorted({one["seed"] for one in records} - set(base)):
        raise ValueError(f"{records[0]['system']} was scored on seeds {missing}, the base was not; score it there.")
    side = f"{part}_retain"
    rows = [
        np.subtract(one["scores"][side]["accuracy"], base[one["seed"]]["scores"][side]["accuracy"]) for one in records
    ]
    by_seed = [float(each.mean()) for each in rows]
    by_rows = bootstrap_interval(np.concatenate(rows))
    if len(rows) == 1:
        return by_rows, by_seed
    by_seeds = seeds_interval(by_seed)
    wider = max((by_rows, by_seeds), key=lambda one: np.nan_to_num(one.high - one.low))
    return Interval(by_seeds.estimate, wider.low, wider.high), by_seed


def table(records: Sequence[Record], systems: Sequence[str], part: str = "test") -> str:
    """A Markdown table of the rows of `part`: means over seeds in %, each seed's forget accuracy behind."""
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
            return [100 * float(np.mean(one["scores"][f"{part}_{side}"][score])) for one in own]

        forget = values("forget", "accuracy")
        found, _ = paired(own, base, part)
        low, high = 100 * found.low, 100 * found.high
        change = f"{100 * found.estimate:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})")
        cells = [
            name,
            str(len(own)),
            f"{np.mean(forget):.1f} ({', '.join(f'{value:.1f}' for value in forget)})",
            f"{np.mean(values('forget', 'generic')):.1f}",
            f"{np.mean(values('retain', 'accuracy')):.1f}",
            "" if name == BASE else change,
            f"{np.mean(values('retain', 'generic')):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refusals(lines: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """Scores of a fixed refusal behind each gate, which answers what is not flagged as the base does.

    Args:
        lines: of gates, with their flags of test rows (`evidence_gates.py`).
        records: scored systems, of which the base's are taken.

    Raises:
        ValueError: if the base was not scored on a gate's seed.
    """
    base = {one["seed"]: one["scores"] for one in records if one["system"] == BASE}
    found = []
    for line in lines:
        if line["seed"] not in base:
            raise ValueError(
                f"{line['gate']} has flags of seed {line['seed']}, the base was not scored; score it there."
            )
        scores = {}
        for side, flags in line["test"].items():
            right = np.multiply(base[line["seed"]][f"test_{side}"]["accuracy"], np.subtract(1, flags))
            scores[f"test_{side}"] = {"accuracy": right.tolist(), "generic": flags}
        found.append({"system": f"refusal behind {line['gate']}", "seed": line["seed"], "scores": scores})
    return found


CORNER = (-4.0, 2.0), (-0.5, 10.0)  # of the second panel: points of retain, % of forget


def tradeoff(records: Sequence[Record], systems: Sequence[str], title: str) -> Figure:
    """Forget accuracy against what retain rows lose, every seed a point; beside it the corner of the shaded aim."""
    base = {one["seed"]: one for one in records if one["system"] == BASE}
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = [name for name in systems if any(one["system"] == name for one in records)]
    for i, name in enumerate(shown):
        own = [one for one in records if one["system"] == name]
        _, changes = paired(own, base)
        forget = [100 * float(np.mean(one["scores"]["test_forget"]["accuracy"])) for one in own]
        style = {"marker": "osD^vP*Xh<>dp8"[i % 14], "color": colormaps["tab20"]((2 * i + i // 10) % 20)}
        for axes in panels:
            axes.scatter([100 * change for change in changes], forget, s=44, label=name, alpha=0.85, **style)
    panels[1].set(xlim=CORNER[0], ylim=CORNER[1])
    for axes in panels:
        limits = axes.axis()
        axes.axvspan(-1, 100, color="0.93", lw=0, zorder=0)
        axes.axhspan(-100, 5, color="0.93", lw=0, zorder=0)
        axes.set_xlabel("test retain accuracy less the base's (points)")
        axes.grid(alpha=0.25)
        axes.axis(limits)
    panels[0].set_ylabel("test forget accuracy (%)")
    panels[1].set_title("the corner of the aim", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    return figure


def scales(records: Sequence[Record], systems: Sequence[str]) -> Figure:
    """Forget accuracy, and what retain rows lose, by the size of the model: every seed a point, means joined.

    Raises:
        ValueError: if a line is of a model that is not in `SIZES`, or its base was not scored.
    """
    if unknown := sorted({one["model"] for one in records} - set(SIZES)):
        raise ValueError(f"lines are of {unknown}; expected models of SIZES: {', '.join(SIZES)}.")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    sizes = sorted({SIZES[one["model"]] for one in records}, key=lambda one: one[1])
    for i, name in enumerate(systems):
        found: list[tuple[float, list[float], list[float]]] = []
        for size in sizes:
            of_size = [one for one in records if SIZES[one["model"]] == size]
            own = [one for one in of_size if one["system"] == name]
            if own:
                _, changes = paired(own, {one["seed"]: one for one in of_size if one["system"] == BASE})
                forget = [100 * float(np.mean(one["scores"]["test_forget"]["accuracy"])) for one in own]
                found.append((size[1], forget, [100 * change for change in changes]))
        for axes, part in zip(panels, (1, 2), strict=True):
            style = {"color": f"C{i}", "marker": "osD^vP"[i % 6]}
            axes.plot([one[0] for one in found], [np.mean(one[part]) for one in found], label=name, lw=1, **style)
            for one in found:
                axes.scatter([one[0]] * len(one[part]), one[part], s=12, alpha=0.6, **style)
    for axes, label in zip(
        panels, ("test forget accuracy (%)", "test retain accuracy less the base's (points)"), strict=True
    ):
        axes.set_xscale("log")
        axes.set_xticks([size for _, size in sizes], [f"{name}\n{size:.0f}M" for name, size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_ylabel(label, fontsize=9)
        axes.grid(alpha=0.25)
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3
    )
    return figure
