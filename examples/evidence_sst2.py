"""SST-2 on a pretrained model: spul, methods that change weights, gates and rivals, chosen and scored by one plan.

    python examples/evidence_sst2.py choose --model SMOLLM2 --data-dir ../shared/data/sst2 --output-dir out/evidence
    python examples/evidence_sst2.py score --model SMOLLM2 --data-dir ../shared/data/sst2 --output-dir out/evidence
    python examples/evidence_sst2.py table --output-dir out/evidence

`choose` memorizes and tries each system's candidates on held-out training rows; the best by the plan's rule go to
`chosen.json`. `score` scores the chosen ones on test rows, three seeds, and attacks the best four. `all` does both,
and scores a system as soon as its own trials have ended. Every trial is a line of `trials.jsonl`, all else a line of
`scores.jsonl`; a repeated command resumes, and a choice, once made, holds. `--workers` processes share the device.
`table` writes `table.md`, attacks included, and a figure of `scores.jsonl`, `scales` a figure of several models'
`--lines`. The plan is `docs/data/evidence/sst2-plan.json` unless given: with that of multiple choice, whose splits
`choice_rows.py` writes, and which leaves nothing to choose:

    python examples/evidence_sst2.py score --plan docs/data/evidence/choices-smollm2-plan.json --model SMOLLM2 \
        --data-dir out/choices --attacked 0 --output-dir out/evidence-choices
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from evidence import tables
from evidence.jobs import ATTACKS
from evidence.plan import Plan
from evidence.schedule import STAGES, Job, Schedule
from evidence.workers import experiment_of, prepare, work
from paper.tables import read_runs

from spul.evaluation.report import save_figure
from spul.records.files import write_text

PLAN = Path(__file__).parents[1] / "docs" / "data" / "evidence" / "sst2-plan.json"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=(*STAGES, "table", "scales"))
    add("--plan", type=Path, default=PLAN)
    add("--model", help="Hub name or folder of a causal LM")
    add("--data-dir", help="folder of SST-2, or of the four splits of a plan without a data set")
    add("--chosen", type=Path, help="a choice, beside the output folder's: its systems are not tried")
    add("--attacked", type=int, default=200, help="rows of each side under each attack on the best; 0 for none")
    add("--attacked-seeds", nargs="+", type=int, help="of the attacks; those of `--seeds` unless given")
    add("--attack", nargs="+", metavar="NAME", help="systems to attack in place of the best four")
    add(
        "--systems",
        nargs="+",
        help="names in the plan, NAME@1,3 for seeds of its own, or those of a figure; all unless given",
    )
    add("--seeds", nargs="+", type=int, help="to score on; the plan's unless given")
    add("--workers", type=int, default=1, help="processes beside each other")
    add("--tf32", action="store_true", help="float32 products in TF32, on a GPU")
    add("--minutes", type=float, default=1e9, help="begin no job after so many")
    add("--models-dir", type=Path, help="folder of the memorized models; in the output folder unless given")
    add("--lines", nargs="+", type=Path, default=[], help="files of scored systems: of `scales`, or more of `table`")
    add("--gates", type=Path, help="of `table`: gates of `evidence_gates.py`, each shown with a refusal behind it")
    add("--output-dir", type=Path, default=Path("out/evidence"))
    args = parser.parse_args()
    if args.stage == "scales" and not args.lines:
        parser.error("scales needs --lines.")
    if args.stage in STAGES and not (args.model and args.data_dir):
        parser.error(f"{args.stage} needs --model and --data-dir.")
    return args


def wanted_systems(args: argparse.Namespace, plan: Plan) -> dict[str, Sequence[int]]:
    """The seeds to score each system of the command on, by its name."""
    seeds, names = args.seeds or plan.seeds, [system.name for system in plan.systems]
    found: dict[str, Sequence[int]] = {}
    for given in args.systems or names:
        name, _, own = given.partition("@")
        if name not in names or (own and not all(part.isdecimal() for part in own.split(","))):
            raise SystemExit(f"--systems {given!r}: expected NAME or NAME@SEED,SEED; the plan has {names}.")
        found[name] = [int(part) for part in own.split(",")] if own else seeds
    return found


def earlier_choice(args: argparse.Namespace, plan: Plan, wanted: dict[str, Sequence[int]]) -> dict[str, Any]:
    """The choice of earlier calls; `score` needs one for each system that it is to score and that has candidates."""
    own, found = args.output_dir / "chosen.json", {}
    for path in (args.chosen, own):
        if path is not None and path.exists():
            more = json.loads(path.read_text(encoding="utf-8"))["systems"]
            if other := [name for name in more if name in found and more[name] != found[name]]:
                raise SystemExit(f"--chosen {args.chosen} and {own} differ in {other[0]}; take another --output-dir.")
            found |= more
        elif path is args.chosen and path is not None:
            raise SystemExit(f"--chosen {path} does not exist.")
    if args.stage == "score":
        needed = [plan.chooses_by(plan.system(name)) for name in wanted]
        if missing := [name for name in dict.fromkeys(needed) if name is not None and name not in found]:
            raise SystemExit(
                f"{args.chosen or own} has no settings for {', '.join(missing)}; run `choose`, name another file by "
                "--chosen, or others by --systems."
            )
    return {"systems": found}


def summary(record: dict[str, Any]) -> str:
    """A record in a line: forget and retain accuracy (generic answers), or what attacks do to forget rows, in %."""

    def percent(values: Any) -> float:
        return 100 * (sum(values) / len(values) if isinstance(values, list) else values)

    parts = [record["job"], f"{record['job_seconds']:.0f} s"]
    if "cost" in record:
        parts.append(f"cost {record['cost']:.3f}")
    for name, one in record.get("scores", {}).items():
        parts.append(f"{name} {percent(one['accuracy']):.1f} ({percent(one['generic']):.1f})")
    inputs = [(percent(one["accuracy"]), one["attack"]) for one in record.get("inputs", ()) if one["side"] == "forget"]
    parts += [f"{name} {value:.1f}" for value, name in sorted(inputs, key=lambda one: -one[0])]  # the worst first
    if "four_bit" in record:
        parts += [f"{side} {percent(record['four_bit'][side]['accuracy']):.1f}" for side in ("forget", "retain")]
    for one in record.get("relearning", ()):
        parts.append(f"{one['lr']:g} {one['step']}: {percent(one['accuracy']):.1f}")
    return "  ".join(parts)


def known_records(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of earlier calls; one that an interrupted call left unfinished is taken out of the file.

    Args:
        path: of the lines.
        facts: fields that lines share with those of this call, as far as they have them.
    """
    records = read_runs(path) if path.exists() else []
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    for name, value in facts.items():
        if others := [one[name] for one in records if one.get(name, value) != value]:
            raise SystemExit(f"{path} has lines of {name} {others[0]!r}, not {value!r}; take another --output-dir.")
    return records


def write_tables(args: argparse.Namespace, plan: Plan) -> None:
    """`table.md` and `tradeoff.png` of the scored systems."""
    folder, path = args.output_dir, args.output_dir / "scores.jsonl"
    paths = ([path] if path.exists() else []) + args.lines
    lines = [one for each in reversed(paths) for one in read_runs(each) if "scores" in one]
    found = {(one["system"], one["seed"]): one for one in lines}  # the first file's, where several have them
    if not found:
        raise SystemExit(f"{path} has no scores; run `score` first, or name files by --lines.")
    records, systems = list(found.values()), [system.name for system in plan.systems]
    if args.gates is not None:
        behind = tables.refusals(read_runs(args.gates), records)
        records += behind
        systems += dict.fromkeys(one["system"] for one in behind)
    text = tables.table(records, systems)
    if all("train_forget" in one["scores"] for one in records):
        text += "\n\nTraining rows, at most 500 of a side:\n\n" + tables.table(records, systems, "train")
    lines = [one for each in reversed(paths) for one in read_runs(each)]
    attacks = list({one["job"]: one for one in lines if set(one) & set(ATTACKS)}.values())
    for side in tables.SIDES if any("inputs" in one for one in attacks) else ():
        text += f"\n\n{side.capitalize()} rows under attack:\n\n" + tables.attacked(attacks, systems, side)
    if any("four_bit" in one for one in attacks):
        text += "\n\nIn 4 bit, and relearned:\n\n" + tables.undone(attacks, systems)
    (folder / "table.md").write_text(text + "\n")
    shown = args.systems or [name for name in systems if name not in ("vanilla", tables.BASE)]
    model = records[0]["model"]
    title = f"{plan.data} on {tables.SIZES.get(model, (model,))[0]}: every seed a point"
    save_figure(tables.tradeoff(records, shown, title), folder / "tradeoff")
    print(text)


def write_scales(args: argparse.Namespace, plan: Plan) -> None:
    """`scales.png` of systems on models of several sizes: those of `--systems`, or all that several models have."""
    records = [record for path in args.lines for record in read_runs(path) if "scores" in record]
    models = {
        system.name: {tables.SIZES.get(one["model"]) for one in records if one["system"] == system.name}
        for system in plan.systems
    }
    systems = args.systems or [name for name, found in models.items() if len(found) > 1 and name != tables.BASE]
    if missing := [name for name in systems if not models.get(name)]:
        raise SystemExit(f"--systems {missing[0]!r}: the lines have {[*filter(models.get, models)]}.")
    if not systems:
        raise SystemExit("no system was scored on models of several sizes; name more --lines, or --systems.")
    save_figure(tables.scales(records, systems), args.output_dir / "scales")


class Files:
    """The lines and the choice in the output folder, written as they come."""

    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        self.folder = args.output_dir
        facts = {"model": Path(args.model).name, "tf32": args.tf32, "rule": plan.rule}
        facts |= {"attacked": args.attacked} if args.attacked and args.stage != "choose" else {}
        self.known = [record for name in ("trials", "scores") for record in known_records(self.path(name), facts)]
        one = next((record for record in self.known if "experiment" in record), None)  # all seeds share setup and data
        if one is not None and experiment_of(args, one["seed"]).digest != one["experiment"]:
            raise SystemExit(
                f"{self.folder} has lines of other data, another model or another `setup` of the plan than this "
                "command's; take another --output-dir."
            )

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def add(self, record: dict[str, Any]) -> None:
        """Append a line."""
        with self.path("trials" if "candidate" in record else "scores").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def write_choice(self, choice: dict[str, Any]) -> None:
        write_text(self.folder / "chosen.json", json.dumps(choice, indent=1) + "\n")


def run(args: argparse.Namespace, plan: Plan) -> None:
    """Do the jobs of a stage, `--workers` at a time."""
    begun, wanted, files = time.monotonic(), wanted_systems(args, plan), Files(args, plan)
    attacked = (args.attacked_seeds or args.seeds or plan.seeds) if args.attacked else ()
    if args.attack and not args.attacked:
        raise SystemExit("--attack names systems, and --attacked 0 attacks none; give a number of rows.")
    if unknown := sorted(set(args.attack or ()) - {system.name for system in plan.systems}):
        raise SystemExit(f"--attack {unknown[0]!r}: expected names of the plan.")
    choice = earlier_choice(args, plan, wanted | dict.fromkeys(args.attack or (), attacked))
    schedule = Schedule(plan, args.stage, wanted, attacked, choice, files.known, args.attack)
    files.write_choice(schedule.choice)
    running: dict[Future, Job] = {}
    broken, fresh = False, True

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True)

    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        while True:
            late = broken or time.monotonic() - begun > 60 * args.minutes
            for job in [] if late else schedule.ready()[: args.workers - len(running)]:
                schedule.begin(job)
                running[pool.submit(work, args, job, schedule.settings(job))] = job
            if not running:
                break
            if fresh:  # the other workers start while these memorize
                for _ in range(args.workers - len(running)):
                    pool.submit(prepare, args, sorted({job.seed for job in schedule.jobs()}))
                fresh = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                record = None if error else future.result()
                if record is None:
                    broken = broken or isinstance(error, BrokenProcessPool)  # a worker died, and takes the pool along
                    say(f"{job.key} FAILED: {error!r}\n{error.__cause__ or ''}")  # the worker's traceback
                else:
                    files.add(record)
                    say(summary(record))
                for name in schedule.end(job, record):
                    files.write_choice(schedule.choice)
                    one = schedule.choice["systems"][name]
                    say(f"chosen: {name}, {one['cost']:.3f} {one['held_out']} {one['settings']}")
    if left := schedule.waiting():
        print(f"not begun: {', '.join(job.key for job in left)}")
    if schedule.failed:
        print(f"failed: {', '.join(sorted(schedule.failed))}")
    if left or schedule.failed:
        raise SystemExit(1)


def main() -> None:
    args = parse_args()
    plan = Plan.read(args.plan)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.stage == "table":
        write_tables(args, plan)
    elif args.stage == "scales":
        write_scales(args, plan)
    else:
        run(args, plan)


if __name__ == "__main__":
    main()
