"""Tables and figures of scored systems: forget accuracy, retain accuracy beside the base's on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from spul.evaluation.metrics.intervals import Interval, bootstrap_interval, seeds_interval

BASE = "base"
SIDES = ("forget", "retain")
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


# A column of attacks on the input: its name, and groups that stand side by side; of several attacks a range.
Column = tuple[str, list[list[str]]]
AFTER, BEFORE = ([f"jailbreak {i} {where}" for i in range(1, 7)] for where in ("after", "before"))
AROUND: list[Column] = [
    ("jailbreaks after, six", [AFTER]),
    ("jailbreaks before, six", [BEFORE]),
    ("all of these before", [["all jailbreaks before"]]),
]
TURNS: list[Column] = [
    ("one turn before", [["diluted, 1 turns"]]),
    ("four turns", [["diluted, 4 turns"]]),
    ("jailbreaks and a turn", [["jailbreaks and a turn before"]]),
    ("in a document of 300 words", [["in a document of 300 words"]]),
]
DISGUISES: list[Column] = [
    ("capitals, random case", [["capitals"], ["random case"]]),
    ("misspelled", [["misspelt"]]),
    ("look-alike letters, apart, hyphenated", [["look-alike letters"], ["letters apart"], ["letters hyphenated"]]),
]
AS_ASKED: Column = ("as asked", [["none"]])
MIXED = [["mixed query, asked first"], ["mixed query, asked second"]]
COLUMNS: dict[str, list[Column]] = {
    "forget": [
        AS_ASKED,
        ("spaces", [["spaces"]]),
        *AROUND,
        *DISGUISES,
        *TURNS,
        ("beside another question, asked first, second", MIXED),
    ],
    "retain": [AS_ASKED, *AROUND, *TURNS, ("beside a forget question, asked first, second", MIXED)],
}


def percent(value: float) -> str:
    """A share in %: whole, with a digit where it is below 1."""
    value *= 100
    return f"{value:.1f}" if 0.05 <= value < 0.95 else f"{value:.0f}"


def attacked(records: Sequence[Record], systems: Sequence[str], side: str) -> str:
    """A Markdown table of right answers under each attack on the input, in %: means over the seeds of a line.

    Args:
        records: lines with `inputs`.
        systems: rows, those without lines left out.
        side: `forget` or `retain`.
    """
    names = [name for name, _ in COLUMNS[side]]
    lines = [f"| | seeds | {' | '.join(names)} |", "|---|" + "---:|" * (len(names) + 1)]
    for system in systems:
        own = [
            {one["attack"]: np.mean(one["accuracy"]) for one in record["inputs"] if one["side"] == side}
            for record in records
            if record["system"] == system and "inputs" in record
        ]
        if not own:
            continue
        cells = [system, str(len(own))]
        for _, groups in COLUMNS[side]:
            shown = []
            for group in groups:
                found = [float(np.mean([one[name] for one in own])) for name in group]
                ends = dict.fromkeys((percent(min(found)), percent(max(found))))
                shown.append(" to ".join(ends))
            cells.append(", ".join(shown))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def undone(records: Sequence[Record], systems: Sequence[str]) -> str:
    """A Markdown table of right answers in 4 bit, and of other forget rows while some are learned again, in %.

    Means over the seeds of a line; of relearning after each number of steps, a column for a rate.
    """
    rates = sorted({one["lr"] for record in records for one in record.get("relearning", ())})
    head = ["4 bit: seeds", "forget", "retain", "relearning: seeds", *(f"at a rate of {rate:g}" for rate in rates)]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for system in systems:
        own = [record for record in records if record["system"] == system]
        bits = [record["four_bit"] for record in own if "four_bit" in record]
        again = [record["relearning"] for record in own if "relearning" in record]
        if not (bits or again):
            continue
        cells = [system, str(len(bits) or "")]
        cells += [percent(np.mean([one[side]["accuracy"] for one in bits])) if bits else "" for side in SIDES]
        cells.append(str(len(again) or ""))
        for rate in rates:
            by_step: dict[int, list[float]] = {}
            for one in (one for each in again for one in each if one["lr"] == rate and one["step"]):
                by_step.setdefault(one["step"], []).append(one["accuracy"])
            cells.append(", ".join(percent(float(np.mean(by_step[step]))) for step in sorted(by_step)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refusals_attacked(gates: Sequence[Record], base: Sequence[Record]) -> list[Record]:
    """Right answers under attack of a fixed refusal behind each gate, which answers what passes as the base does.

    Args:
        gates: lines of `evidence_gates.py`, with flags under each attack.
        base: lines of the base's answers, each of a seed, a side and an attack; gates of other seeds are left out.
    """
    rows = {(one["seed"], one["side"], one["attack"]): one["accuracy"] for one in base}
    found = []
    for gate in (gate for gate in gates if any(seed == gate["seed"] for seed, *_ in rows)):
        inputs = []
        for one in gate["inputs"]:
            answers = rows[gate["seed"], one["side"], one["attack"]]
            right = np.multiply(answers, np.subtract(1, one["flagged"])).tolist()
            inputs.append({"side": one["side"], "attack": one["attack"], "accuracy": right})
        found.append({"system": f"refusal behind {gate['gate']}", "seed": gate["seed"], "inputs": inputs})
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
