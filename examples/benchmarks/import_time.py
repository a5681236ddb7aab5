"""Seconds that imports take, each in a process of its own, in turn.

python examples/benchmarks/import_time.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import common
import torch

IMPORTS = {
    "torch": "import torch",
    "torch, transformers, PEFT": "import torch; from transformers import AutoModelForCausalLM; import peft",
    "spul": "import spul",
    "spul's prompt and losses": "import spul; spul.SoftPromptUnlearner; spul.UnlearningLoss",
    "spul's trainer": "import spul; spul.UnlearningTrainer",
    "spul's evaluation": "import spul; spul.evaluate",
}


def seconds(statement: str) -> float:
    """Seconds of a statement in a fresh interpreter, without its start."""
    program = f"import time; start = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(1 + args.rounds):  # the first one reads files from disk
        for name, statement in IMPORTS.items():
            took = seconds(statement)
            if turn:
                found[name].append(took)
    records = [
        {"import": name, "seconds": statistics.median(each), "all_seconds": each} for name, each in found.items()
    ]
    where = {"rounds": args.rounds, "python": sys.version.split()[0], "torch": torch.__version__}
    common.report("Imports", where, ["import", "seconds"], [[r["import"], r["seconds"]] for r in records])
    common.write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
