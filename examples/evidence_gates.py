"""Text gates on SST-2, alone and with passages of prose to tell requests from, as asked and under every attack.

    python examples/evidence_gates.py --model SMOLLM2 --data-dir ../shared/data/sst2 --prose-dir ../shared/data/imdb

A gate is fit on the plan's training rows; one of them also on `--passages` passages of IMDB's training reviews that
name nobody to be forgotten, each as long as a gate's window. No model is run: `--model` gives the tokenizer. With
`--answers`, files in which the base's answers to the same rows are, by row, the table has the accuracy of a fixed
refusal behind the gate, which answers what is not flagged as the base does.

Every gate and seed is a line of `gates.jsonl`: what was held out, and the flags of each test row and attacked row.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from evidence.jobs import attacked_rows
from evidence.plan import Plan
from evidence.systems import split_rows
from evidence_sst2 import PLAN
from paper.experiment import Experiment
from paper.tables import read_runs

from spul.data.known_reviews import SST2_FORGET_NAMES, load_imdb
from spul.data.recognizers import NameFinder
from spul.gates import TextGate
from spul.gates.windows import window_size, with_windows

GATES = {"text gate": 0.99, "text gate, prose": 0.99, "text gate, prose, recall 99.8 %": 0.998}  # recall asked for
SIDES = ("forget", "retain")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub name or folder of a causal LM, for its tokenizer")
    add("--data-dir", required=True, help="folder of SST-2, or of the four splits of a plan without a data set")
    add("--prose-dir", help="folder of IMDB, for gates that know prose")
    add("--plan", type=Path, default=PLAN)
    add("--passages", type=int, default=2000, help="of prose")
    add("--attacked", type=int, default=200, help="rows of each side under each attack; 0 for none")
    add(
        "--gates",
        nargs="+",
        choices=GATES,
        default=list(GATES),
        metavar="NAME",
        help=", ".join(GATES).replace("%", "%%"),
    )
    add("--seeds", nargs="+", type=int, help="the plan's unless given")
    add("--answers", nargs="*", type=Path, default=[], help="files of lines with the base's scores by row")
    add("--output-dir", type=Path, default=Path("out/evidence-gates"))
    args = parser.parse_args()
    if args.prose_dir is None and any("prose" in name for name in args.gates):
        parser.error("--prose-dir is needed for gates that know prose; or name others by --gates.")
    return args


def passages_of_prose(folder: str, size: int, most: int, seed: int) -> list[str]:
    """A window of each of some training reviews of IMDB that name nobody to be forgotten."""
    finder, draws = NameFinder(SST2_FORGET_NAMES), random.Random(seed)
    data = load_imdb(folder).splits
    texts = sorted({*data["train_forget"]["text"][:], *data["train_retain"]["text"][:]})
    found: dict[str, None] = {}
    for text in draws.sample(texts, len(texts)):
        if len(found) < most and len(text) > size and not finder.find(text):
            found[draws.choice(with_windows(text, size)[1:])] = None
    return list(found)


def measured(args: argparse.Namespace, experiment: Experiment, key: dict[str, Any]) -> dict[str, Any]:
    """The line of a gate: its report, and its flags by row."""
    name, seed = key["gate"], key["seed"]
    train, scored = split_rows(experiment, None)
    forget, retain = (train[side]["prompt"][:] for side in SIDES)
    if "prose" in name:
        retain = retain + passages_of_prose(args.prose_dir, window_size(forget), args.passages, seed)
    begun = time.perf_counter()
    gate = TextGate.fit(forget, retain, recall=GATES[name])
    line = key | {"retain_texts": len(retain)}
    line |= {"fit_seconds": time.perf_counter() - begun, "report": str(gate.report)}
    line["test"] = {side: gate.flags(rows["prompt"][:]).astype(int).tolist() for side, rows in scored.items()}
    attacked = attacked_rows(experiment, scored, args.attacked) if args.attacked else ()
    line["inputs"] = [
        {"side": side, "attack": attack, "flagged": gate.flags(rows["prompt"][:]).astype(int).tolist()}
        for side, attack, rows in attacked
    ]
    return line


def base_answers(paths: list[Path]) -> dict[tuple[int, str, str], np.ndarray]:
    """The base's right answers by row: of test rows as asked (`"test"`), and under each attack, by seed and side."""
    found = {}
    for record in (one for path in paths for one in read_runs(path) if one["system"] == "base"):
        for side in SIDES:
            if f"test_{side}" in record.get("scores", {}):
                found[record["seed"], side, "test"] = np.array(record["scores"][f"test_{side}"]["accuracy"])
        attacked = record.get("inputs", [record] if "attack" in record else [])
        for one in attacked:
            found[record["seed"], one["side"], one["attack"]] = np.array(one["accuracy"])
    return found


def table(lines: list[dict[str, Any]], answers: dict[tuple[int, str, str], np.ndarray]) -> str:
    """A Markdown table: forget rows that are missed, retain rows that are flagged, a refusal's accuracy, in %."""
    rows = ["| gate | seed | under | forget missed | retain flagged | forget answered | retain answered | the base |"]
    rows.append("|---|---:|---|---:|---:|---:|---:|---:|")
    for line in lines:
        flags = {(side, "test"): np.array(line["test"][side], dtype=bool) for side in SIDES}
        flags |= {(one["side"], one["attack"]): np.array(one["flagged"], dtype=bool) for one in line["inputs"]}
        for attack in dict.fromkeys(attack for _, attack in flags):
            flagged = [flags.get((side, attack), np.zeros(0, dtype=bool)) for side in SIDES]
            right = [answers.get((line["seed"], side, attack)) for side in SIDES]
            cells = [1 - flagged[0].mean(), flagged[1].mean()]
            known = [one for one in right if one is not None]
            if len(known) == len(SIDES):
                cells += [(one * ~flag).mean() for one, flag in zip(known, flagged, strict=True)]
                cells.append(known[1].mean())
            shown = [f"{100 * cell:.1f}" for cell in cells] + [""] * (5 - len(cells))
            rows.append(f"| {line['gate']} | {line['seed']} | {attack} | {' | '.join(shown)} |")
    return "\n".join(rows)


def key_of(args: argparse.Namespace, experiment: Experiment, name: str) -> dict[str, Any]:
    """The fields by which the line of a gate is known."""
    key = {"gate": name, "seed": experiment.setup.seed, "experiment": experiment.digest, "recall": GATES[name]}
    return key | {"attacked": args.attacked} | ({"passages": args.passages} if "prose" in name else {})


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plan, path = Plan.read(args.plan), args.output_dir / "gates.jsonl"
    known, lines = read_runs(path) if path.exists() else [], []
    asked = args.seeds or plan.seeds
    for seed in dict.fromkeys([*(one["seed"] for one in known), *asked]):  # the table has earlier calls' lines, too
        experiment = plan.experiment(seed, args.model, args.data_dir, args.output_dir / "models")
        for name in GATES:
            key = key_of(args, experiment, name)
            line = next((one for one in known if one | key == one), None)
            if line is None and seed in asked and name in args.gates:
                line = measured(args, experiment, key)
                print(name, seed, line["report"], sep="\n", flush=True)
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            lines += [] if line is None else [line]
    text = table(lines, base_answers(args.answers))
    (args.output_dir / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
