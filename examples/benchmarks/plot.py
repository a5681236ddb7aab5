"""Draw the results that step_time.py, prompt_length.py and inference.py wrote with --json.

python examples/benchmarks/plot.py --step step.json --length length.json --inference inference.json --output figure.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

COLORS = {"plain": "#c44e52", "PEFT": "#c44e52", "PEFT, last logits": "#dd8452", "spul": "#4c72b0"}
GRAY = "#8c8c8c"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=Path, required=True)
    parser.add_argument("--length", type=Path, required=True)
    parser.add_argument("--inference", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("performance.png"))
    args = parser.parse_args()
    step, length, inference = (json.loads(path.read_text()) for path in (args.step, args.length, args.inference))

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    timed = [record for record in step["records"] if "step" in record]
    bars(axes[0], timed, "shape", "step", "seconds", 1.0)
    axes[0].set(title="One training step", ylabel="seconds")
    bars(axes[1], timed, "shape", "step", "peak_bytes", 1e-9)
    axes[1].set(title="Peak memory over the loaded model", ylabel="GB")
    for name in dict.fromkeys(record["step"] for record in length["records"]):
        points = sorted((r["p"], r["seconds"]) for r in length["records"] if r["step"] == name)
        axes[2].plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS.get(name, GRAY))
    axes[2].set(title=f"Step time by prompt length ({length['where']['shape']})", xlabel="virtual tokens")
    axes[2].set(ylabel="seconds", ylim=(0, 1.15 * max(record["seconds"] for record in length["records"])))
    axes[2].legend(frameon=False)
    bars(axes[3], inference["records"], "task", "model", "over_base", 1.0)
    axes[3].set(title="Inference time over the base alone")
    axes[3].axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    where = step["where"]
    figure.suptitle(f"{where['model']}, {where['dtype']}, {where['device']}, {where['threads']} threads", fontsize=10)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"written to {args.output}")


def bars(axis: Any, records: list[dict[str, Any]], groups: str, kind: str, value: str, scale: float) -> None:
    """Bars of each kind, side by side within each group, with their values above."""
    names, kinds = (list(dict.fromkeys(record[field] for record in records)) for field in (groups, kind))
    width = 0.8 / len(kinds)
    for i, this in enumerate(kinds):
        found = {record[groups]: record[value] * scale for record in records if record[kind] == this}
        positions = [names.index(name) + (i - (len(kinds) - 1) / 2) * width for name in found]
        drawn = axis.bar(positions, list(found.values()), width, label=this, color=COLORS.get(this, GRAY))
        axis.bar_label(drawn, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
