"""Time to forget: steps, rows and seconds until held-out rows are forgotten and the others retained, by recipe.

    python examples/benchmarks/time_to_forget.py                                  # the quick start's task, 5 seeds
    python examples/benchmarks/time_to_forget.py --tasks quickstart sst2 --data-dir DIR --model NAME --bases out/gated

Held-out training rows are scored every `--every` steps. A run ends at the first scoring with at most 5 % of the forget
rows answered and retain accuracy within one point of the base's, or after `--max-steps`. Seconds are those of
training, without scoring, saving and the reference logits, computed once for a base. Those before it, in which base
and prompt are made, stand beside them.

Recipes are `published` (the SPUL paper's), `by hand` (the settings that this library's examples had found),
`defaults`, and each lever alone: the published recipe with one setting of the defaults. They stand in `recipes.py`.
Labels are one token in both tasks, so that a reduction over tokens is no lever.

Every run is a line of JSON in the output file. A command given again makes the missing ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import report
from recipes import PROMPT_TYPES, Recipe, recipes
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningTrainer, forget_retain_dataset
from spul.data import HeldOut, hold_out
from spul.training import StopWhenForgotten

SEEDS = {"quickstart": (0, 1, 2, 3, 4), "sst2": (1, 2, 3)}
TARGET, MARGIN = 5.0, 1.0  # percent of forget rows; points of retain accuracy


# ---- tasks ----


@dataclass(frozen=True)
class Task:
    """A base and its rows.

    Args:
        base: loads a fresh copy of the base.
        rows: training rows, and held-out ones by side.
        collator: for prompts of some virtual tokens.
        options: further `TrainingArguments`.
    """

    base: Callable[[], Any]
    rows: HeldOut
    collator: Callable[[int], ForgetRetainCollator]
    options: dict[str, Any]


def quickstart_task(args: argparse.Namespace, seed: int) -> Task:
    """The made-up reviews and the small model of `examples/quickstart.py`."""
    from toy_reviews import GENERIC, build_base, make_splits

    folder, splits = args.bases / f"quickstart-{seed}", make_splits(seed)
    if not (folder / "tokenizer.json").exists():  # saved last
        build_base(folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = forget_retain_dataset(splits["train_forget"], splits["train_retain"])
    return Task(
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        held_out(args, dataset, seed),
        lambda num_virtual_tokens: ForgetRetainCollator(tokenizer, GENERIC, max_length=128, seed=seed),
        {},
    )


def sst2_task(args: argparse.Namespace, seed: int) -> Task:
    """SST-2 on a base that memorized all rows, as in `examples/gated.py`."""
    from gated import experiment_of

    experiment = experiment_of(argparse.Namespace(**{**vars(args), "output_dir": args.bases}), seed)
    dataset = forget_retain_dataset(experiment.rows["train_forget"], experiment.rows["train_retain"])
    experiment.load("base")  # memorized now, if it is not there
    return Task(
        lambda: experiment.load("base"),
        held_out(args, dataset, seed),
        lambda num_virtual_tokens: experiment.collator_for(None, experiment.setup.max_length - num_virtual_tokens),
        {"bf16": experiment.setup.bf16 and torch.cuda.is_available(), "train_sampling_strategy": "group_by_length"},
    )


TASKS = {"quickstart": quickstart_task, "sst2": sst2_task}


def held_out(args: argparse.Namespace, dataset: Any, seed: int) -> HeldOut:
    """Rows to train on, and at most `--most` held-out rows of each side."""
    train, *sides = hold_out(dataset, args.held_out, seed)
    forget, retain = (rows.shuffle(seed).select(range(min(args.most, len(rows)))) for rows in sides)
    return HeldOut(train, forget, retain)


# ---- runs ----


class Timed(StopWhenForgotten):
    """Measures the seconds of training, without scoring and saving."""

    seconds, since = 0.0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.since
        super().on_step_end(*args, **kwargs)
        self.since = time.perf_counter()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()


def measured(args: argparse.Namespace, task: Task, prompt_type: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train until the rows are forgotten; steps, rows and seconds, None where that was not reached."""
    set_seed(seed)
    collator = task.collator(recipe.num_virtual_tokens)
    train, begun = task.rows.train, time.perf_counter()
    unlearner = SoftPromptUnlearner(
        task.base(),
        recipe.prompt_config(prompt_type),
        loss=recipe.loss(),
        prompt_position=recipe.prompt_position,
        start=recipe.start_of(train, collator),
    )
    seconds_of_start = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearningTrainer(
            unlearner,
            recipe.arguments(folder, seed, args.max_steps, **task.options),
            collator,
            train,
            forget_fraction=recipe.forget_fraction,
        )
        stop = Timed(
            trainer, task.rows.forget, task.rows.retain, every=args.every, margin=MARGIN, target=TARGET, patience=0
        )
        trainer.add_callback(stop)
        trainer.train()
    assert stop.base is not None
    assert stop.best is not None
    steps = trainer.state.global_step if stop.is_met else None
    return {
        "steps": steps,
        "rows": steps and steps * recipe.batch_size,
        "seconds": stop.seconds if stop.is_met else None,
        "seconds_of_start": seconds_of_start,
        "seconds_per_step": stop.seconds / trainer.state.global_step,
        "base": stop.base._asdict(),
        "best": stop.best._asdict(),
        "scores": [list(score) for score in stop.scores],
    }


def planned(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The identity of each run that is asked for."""
    for task in args.tasks:
        for seed in args.seeds or SEEDS[task]:
            for prompt_type in args.prompt_types:
                for name, recipe in recipes(task, prompt_type).items():
                    if args.recipes is None or name in args.recipes:
                        yield {
                            "task": task,
                            "model": None if task == "quickstart" else Path(args.model).name,
                            "seed": seed,
                            "prompt_type": prompt_type,
                            "recipe": name,
                            "settings": dataclasses.asdict(recipe),
                            "every": args.every,
                            "max_steps": args.max_steps,
                            "held_out": [args.held_out, args.most],
                        }


def known_runs(path: Path) -> list[dict[str, Any]]:
    """The stored runs; a last line that was cut off is dropped from the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def make_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that are asked for, those that are missing made and stored."""
    path: Path = args.output
    path.parent.mkdir(parents=True, exist_ok=True)
    plan, known = list(planned(args)), known_runs(path)
    stored = {json.dumps(run["run"], sort_keys=True): run for run in known}
    task: tuple[Any, Task] | None = None
    for run in tqdm(plan, desc="runs"):
        key = json.dumps(run, sort_keys=True)
        if key in stored:
            continue
        which = (run["task"], run["seed"])
        if task is None or task[0] != which:
            task = (which, TASKS[run["task"]](args, run["seed"]))
        found = measured(args, task[1], run["prompt_type"], Recipe(**run["settings"]), run["seed"])
        stored[key] = {"run": run, **found, "on": surroundings()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stored[key]) + "\n")
        tqdm.write(f"{run['task']}, seed {run['seed']}, {run['prompt_type']}, {run['recipe']}: {outcome(stored[key])}")
    return [stored[json.dumps(run, sort_keys=True)] for run in plan]


def surroundings() -> dict[str, Any]:
    """The conditions of a measurement."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def outcome(run: dict[str, Any]) -> str:
    """A run in one line."""
    best = run["best"]
    scores = f"forget {best['forget_accuracy']:.1f} %, retain {best['retain_accuracy']:.1f} % at step {best['step']}"
    if run["steps"] is None:
        return f"not forgotten in {run['run']['max_steps']} steps; best: {scores}"
    return f"{run['steps']} steps, {run['rows']} rows, {run['seconds']:.1f} s; {scores}"


def print_tables(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """A table for each task and prompt type: runs that forgot, and medians over these."""
    columns = ["recipe", "forgot", "steps", "rows", "most rows", "rows, of those by hand", "seconds", "of the start"]
    columns += ["best forget %"]
    for task in args.tasks:
        for prompt_type in args.prompt_types:
            lines, by_hand = [], None
            for name in recipes(task, prompt_type):
                some = [
                    run
                    for run in runs
                    if (run["run"]["task"], run["run"]["prompt_type"], run["run"]["recipe"])
                    == (task, prompt_type, name)
                ]
                if not some:
                    continue
                met = [run for run in some if run["steps"] is not None]
                median = {
                    key: statistics.median(run[key] for run in met) if met else "-"
                    for key in ("steps", "rows", "seconds")
                }
                by_hand = median["rows"] if name == "by hand" and len(met) == len(some) else by_hand
                share = median["rows"] / by_hand if met and by_hand else "-"
                worst = max(run["best"]["forget_accuracy"] for run in some)
                most = max(run["rows"] for run in met) if len(met) == len(some) else "-"
                forgot = f"{len(met)} of {len(some)}"
                starts = [run["seconds_of_start"] for run in some if "seconds_of_start" in run]
                start = statistics.median(starts) if starts else "-"
                lines.append(
                    [name, forgot, median["steps"], median["rows"], most, share, median["seconds"], start, worst]
                )
            where = {**runs[0]["on"], "every": args.every, "max steps": args.max_steps} if lines else {}
            if lines:
                report(f"{task}, {prompt_type}", where, columns, lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = sorted({name for task in TASKS for kind in PROMPT_TYPES for name in recipes(task, kind)})
    add("--tasks", nargs="+", choices=TASKS, default=["quickstart"])
    add("--seeds", nargs="+", type=int, help="five for the quick start, three for SST-2 unless given")
    add("--prompt-types", nargs="+", choices=PROMPT_TYPES, default=list(PROMPT_TYPES))
    add("--recipes", nargs="+", choices=names, help="all of them unless given")
    add("--every", type=int, default=10, help="steps between scorings")
    add("--max-steps", type=int, default=600, help="steps after which a run gives up, and length of the schedules")
    add("--held-out", type=float, default=0.2, help="share of the training rows to score on")
    add("--most", type=int, default=200, help="held-out rows scored of each side")
    add("--data-dir", help="folder of SST-2")
    add("--model", help="Hub name or folder of the causal LM that learns SST-2")
    add(
        "--bases", type=Path, default=Path("out/bases"), help="folder of bases; memorized ones as of examples/gated.py"
    )
    add("--output", type=Path, default=Path("out/time_to_forget.jsonl"), help="a line of JSON for each run")
    args = parser.parse_args()
    if "sst2" in args.tasks and not (args.data_dir and args.model):
        parser.error("--tasks sst2 needs --data-dir and --model.")
    return args


def main() -> None:
    args = parse_args()
    print_tables(args, make_runs(args))


if __name__ == "__main__":
    main()
