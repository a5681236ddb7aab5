"""SST-2 on a pretrained model: spul, methods that change weights, gates and rivals, chosen and scored by one plan.

    python examples/evidence_sst2.py choose --model SMOLLM2 --data-dir ../shared/data/sst2 --output-dir out/evidence
    python examples/evidence_sst2.py score --model SMOLLM2 --data-dir ../shared/data/sst2 --output-dir out/evidence
    python examples/evidence_sst2.py table --output-dir out/evidence

`choose` memorizes and tries each system's candidates on held-out training rows; the best by the plan's rule go to
`chosen.json`. `score` scores the chosen ones on test rows, three seeds, and attacks the best four. Every trial and
every scored system is a line of `trials.jsonl` or `scores.jsonl`; a repeated command resumes. `--workers` processes
share the device. `table` writes `table.md` and a figure of `scores.jsonl`. The plan is
`docs/data/evidence/sst2-plan.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from evidence import jobs, tables
from evidence.plan import TRAINED, Plan, choose
from paper.experiment import Experiment
from paper.tables import read_runs

from spul.evaluation.report import save_figure
from spul.records.files import write_text

PLAN = Path(__file__).parents[1] / "docs" / "data" / "evidence" / "sst2-plan.json"


@dataclass(frozen=True)
class Job:
    """A job of a worker, known by its key.

    Args:
        kind: `memorize`, `trial` or `score`.
        seed: of the experiment.
        system: name of the system, or of the model to memorize.
        candidate: of a trial.
    """

    kind: str
    seed: int
    system: str
    candidate: int | None = None

    @property
    def key(self) -> str:
        return json.dumps([self.kind, self.seed, self.system, self.candidate])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=("choose", "score", "table"))
    add("--plan", type=Path, default=PLAN)
    add("--model", help="Hub name or folder of a causal LM")
    add("--data-dir", help="folder of SST-2")
    add("--chosen", type=Path, help="of `score`: the choice; chosen.json of the output folder unless given")
    add("--attacked", type=int, default=200, help="rows of each side under each attack; 0 for none")
    add("--systems", nargs="+", help="names in the plan; all unless given")
    add("--seeds", nargs="+", type=int, help="of `score`; the plan's unless given")
    add("--workers", type=int, default=1, help="processes beside each other")
    add("--tf32", action="store_true", help="float32 products in TF32, on a GPU")
    add("--minutes", type=float, default=1e9, help="begin no job after so many")
    add("--models-dir", type=Path, help="folder of the memorized models; in the output folder unless given")
    add("--output-dir", type=Path, default=Path("out/evidence"))
    args = parser.parse_args()
    if args.stage != "table" and not (args.model and args.data_dir):
        parser.error(f"{args.stage} needs --model and --data-dir.")
    return args


# ---- in a worker ----


@lru_cache(maxsize=4)
def kept_experiment(plan: Path, seed: int, model: str, data_dir: str, folder: Path) -> Experiment:
    return Plan.read(plan).experiment(seed, model, data_dir, folder)


def experiment_of(args: argparse.Namespace, seed: int) -> Experiment:
    return kept_experiment(args.plan, seed, args.model, args.data_dir, args.models_dir or args.output_dir / "models")


def choice_of(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """The stored choice; each system that is to be scored and has candidates must be in it."""
    path = args.chosen or args.output_dir / "chosen.json"
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run `choose` first, or name another by --chosen.")
    chosen: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = args.systems or [system.name for system in plan.systems]
    choosing = [system.name for system in plan.systems if system.candidates and system.name in wanted]
    if missing := [name for name in choosing if name not in chosen["systems"]]:
        raise SystemExit(
            f"{path} has no settings for {', '.join(missing)}; run `choose`, or name others by --systems."
        )
    return chosen


def prepare(args: argparse.Namespace, seed: int) -> None:
    """Start a worker."""
    time.sleep(0.5)  # so that the others get their own workers
    _ = experiment_of(args, seed).rows
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def work(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Do a job; returns its line."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.workers > 1:
        torch.set_num_threads(1)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    plan, start = Plan.read(args.plan), time.perf_counter()
    experiment = experiment_of(args, job.seed)
    record: dict[str, Any] = {"job": job.key, "seed": job.seed, "system": job.system}
    if job.kind == "memorize":
        record |= jobs.memorized(experiment, job.system)
    else:
        system = next(one for one in plan.systems if one.name == job.system)
        if job.kind == "trial":
            assert job.candidate is not None
            record |= {"candidate": job.candidate} | jobs.trial(plan, experiment, system, job.candidate)
        else:
            chosen = choice_of(args, plan)
            settings = system.settings | chosen["systems"].get(job.system, {}).get("settings", {})
            settings |= {"steps": plan.steps} if system.kind in TRAINED else {}
            attacked = args.attacked if job.system in chosen["attacked"] else 0
            name = job.system.replace(" ", "-").replace(",", "").replace("+", "-")
            folder = args.output_dir / "adapters" / f"{name}-{job.seed}"
            record |= jobs.scores(experiment, system, settings, attacked, folder)
    jobs.clean()
    on_gpu = torch.cuda.is_available()
    record |= {"job_seconds": time.perf_counter() - start, "model": Path(args.model).name}
    record |= {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "tf32": args.tf32, "workers": args.workers}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return record


# ---- the stages ----


def jobs_of(args: argparse.Namespace, plan: Plan) -> Iterator[tuple[Job, set[str]]]:
    """The jobs of a stage, in order, each with the keys of those that it needs."""
    wanted = args.systems or [system.name for system in plan.systems]
    seeds = args.seeds or plan.seeds
    learned = ["base", "retrained"] if "retrained" in wanted else ["base"]
    memorizing = {
        seed: [Job("memorize", seed, name) for name in learned] for seed in dict.fromkeys([plan.choosing_seed, *seeds])
    }
    if args.stage == "choose":
        base = memorizing[plan.choosing_seed][0]
        yield base, set()
        for system in plan.systems:
            if system.name in wanted:
                for i in range(len(system.candidates)):
                    yield Job("trial", plan.choosing_seed, system.name, i), {base.key}
    for some in memorizing.values():
        yield from ((job, set()) for job in some if args.stage == "score" or job != base)
    if args.stage == "choose":
        return
    for seed in seeds:
        for system in plan.systems:
            if system.name in wanted:
                yield Job("score", seed, system.name), {job.key for job in memorizing[seed]}


def summary(record: dict[str, Any]) -> str:
    """A record in a line."""
    scores = record.get("scores", {})
    parts = [record["job"], f"{record['job_seconds']:.0f} s"]
    for name, one in scores.items():
        values = {key: 100 * (sum(v) / len(v) if isinstance(v, list) else v) for key, v in one.items()}
        parts.append(f"{name} {values['accuracy']:.1f} ({values['generic']:.1f})")
    return "  ".join(parts)


def known_records(path: Path, model: str) -> list[dict[str, Any]]:
    """The lines of earlier calls; one that an interrupted call left unfinished is taken out of the file."""
    records = read_runs(path) if path.exists() else []
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    if others := {record["model"] for record in records} - {Path(model).name}:
        raise SystemExit(f"{path} is of {', '.join(sorted(others))}, not of {model}; take another --output-dir.")
    return records


def write_tables(folder: Path, plan: Plan) -> None:
    """`table.md` and `tradeoff.png` of the scored systems."""
    path = folder / "scores.jsonl"
    records = [record for record in (read_runs(path) if path.exists() else []) if "scores" in record]
    if not records:
        raise SystemExit(f"{path} has no scores; run `score` first.")
    systems = [system.name for system in plan.systems]
    text = tables.table(records, systems)
    (folder / "table.md").write_text(text + "\n")
    shown = [name for name in systems if name not in ("vanilla", tables.BASE)]
    save_figure(
        tables.tradeoff(records, shown, f"SST-2 on {records[0]['model']}: every seed a point"), folder / "tradeoff"
    )
    print(text)


def main() -> None:
    args = parse_args()
    plan, begun = Plan.read(args.plan), time.monotonic()
    names = [system.name for system in plan.systems]
    if unknown := [name for name in args.systems or () if name not in names]:
        raise SystemExit(f"--systems {unknown}: the plan has {names}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.stage == "table":
        write_tables(args.output_dir, plan)
        return
    path = args.output_dir / ("trials.jsonl" if args.stage == "choose" else "scores.jsonl")
    known = known_records(path, args.model)
    if args.stage == "score":
        choice_of(args, plan)  # an error before any work
    done = {record["job"] for record in known}
    waiting = [(job, needs) for job, needs in jobs_of(args, plan) if job.key not in done]
    running: dict[Future, Job] = {}
    failed: list[str] = []
    broken = False
    with (
        path.open("a") as file,
        ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool,
    ):
        for seed in [plan.choosing_seed] * args.workers:  # all workers start at once, and read the data
            pool.submit(prepare, args, seed)
        while waiting or running:
            late = broken or time.monotonic() - begun > 60 * args.minutes
            ready = [] if late else [one for one in waiting if one[1] <= done]
            for job, needs in ready[: args.workers - len(running)]:
                running[pool.submit(work, args, job)] = job
                waiting.remove((job, needs))
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception():
                    failed.append(job.key)
                    broken = broken or isinstance(error, BrokenProcessPool)  # a worker died, and takes the pool along
                    print(f"{time.monotonic() - begun:6.0f} s  {job.key} FAILED: {error!r}", flush=True)
                    continue
                record = future.result()
                known.append(record)
                done.add(record["job"])
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(f"{time.monotonic() - begun:6.0f} s  {summary(record)}", flush=True)
    if args.stage == "choose":
        chosen = choose(plan, [record for record in known if record.get("candidate") is not None])
        (args.output_dir / "chosen.json").write_text(json.dumps(chosen, indent=1) + "\n")
        for name, one in chosen["systems"].items():
            print(f"{name}: {one['cost']:.3f} {one['held_out']} {one['settings']}", flush=True)
    if failed or waiting:
        raise SystemExit(f"failed: {failed}; not begun: {[job.key for job, _ in waiting]}")


if __name__ == "__main__":
    main()
