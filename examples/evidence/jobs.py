"""Jobs of a measurement, each a line of data: memorizing, a trial of settings, the scores of a system, its attacks."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from paper.experiment import Experiment
from peft import PeftModel

from evidence.plan import TRAINED, Plan, System
from evidence.systems import Rows, build, collator_of, prompt_on, row_scores, split_rows, stored
from spul.data.known_reviews import SST2_FORGET_NAMES
from spul.evaluation.attacks import relearn
from spul.evaluation.attacks.changes import UnchangedError
from spul.evaluation.attacks.quantization import quantized
from spul.evaluation.attacks.usual import checked_attacks, usual_attacks
from spul.evaluation.metrics import score_completions

Record = dict[str, Any]
ATTACKS = ("inputs", "four_bit", "relearning")
RELEARNED_ROWS, RELEARNING_STEPS, RELEARNING_RATES = 32, (2, 8, 32), (1e-4, 1e-3, 1e-2)


def memorized(experiment: Experiment, name: str) -> Record:
    """The base or the retrained model, made if it is missing."""
    start = time.perf_counter()
    experiment.load(name)
    return {"seconds": time.perf_counter() - start}


def means(rows: dict[str, list[int]]) -> dict[str, float]:
    """Means of scores by row."""
    return {name: float(np.mean(values)) for name, values in rows.items()}


@lru_cache(maxsize=2)
def base_retain(experiment: Experiment, held_out: float) -> float:
    """The base's accuracy on held-out retain rows, which every trial is compared with."""
    _, rows = split_rows(experiment, held_out)
    return means(row_scores(experiment.load("base"), rows["retain"], experiment))["accuracy"]


def trial(plan: Plan, experiment: Experiment, system: System, candidate: int) -> Record:
    """A candidate's scores on held-out training rows, and its cost by the plan's rule."""
    settings = system.candidate(candidate)
    train, held_out = split_rows(experiment, plan.held_out)
    steps = {"steps": plan.choosing_steps} if system.kind in TRAINED else {}
    model, cost = build(system.kind, experiment, train, settings | steps)
    position = settings.get("position", "start")
    scores = {side: means(row_scores(model, rows, experiment, position)) for side, rows in held_out.items()}
    base = base_retain(experiment, plan.held_out)
    compared = plan.cost(scores["forget"]["accuracy"], base - scores["retain"]["accuracy"])
    record = {"settings": settings, "scores": scores, "base_retain": base}
    return record | {"cost": compared, "training": cost, "rows": {side: len(rows) for side, rows in held_out.items()}}


def scores(
    experiment: Experiment, system: System, settings: dict[str, Any], folder: Path, tests_alone: bool = False
) -> Record:
    """A system's scores by row: on test rows, on some training rows, and on test rows with its prompt disabled.

    Args:
        experiment: the data and models of a seed.
        system: the system.
        settings: the chosen ones, with `steps`.
        folder: for the trained adapter.
        tests_alone: test rows, nothing else.
    """
    train, scored = split_rows(experiment, None)
    model, cost = build(system.kind, experiment, train, settings, folder)
    position = settings.get("position", "start")
    tests = {f"test_{side}": rows for side, rows in scored.items()}
    few = {f"train_{side}": rows.select(range(min(len(rows), 500))) for side, rows in train.items()}
    rows_of = tests if tests_alone else tests | few
    record: Record = {"settings": settings, "training": cost}
    record["scores"] = {name: row_scores(model, rows, experiment, position) for name, rows in rows_of.items()}
    if system.kind in ("prompt", "gated") and not tests_alone:
        with model.disable_adapter():
            record["detached"] = {
                name: means(row_scores(model, rows, experiment, position)) for name, rows in tests.items()
            }
    return record


def attacks_of(system: System) -> list[str]:
    """Names of the attacks on a system; 4 bit gives the base's scores beside any other's."""
    left_out = {"relearning"} if system.kind not in TRAINED else set()
    return [name for name in ATTACKS if name not in (left_out | {"four_bit"} if system.kind == "model" else left_out)]


def attack(
    name: str, experiment: Experiment, system: System, settings: dict[str, Any], most: int, folder: Path
) -> Record:
    """The scores of a stored system under an attack.

    Args:
        name: one of `attacks_of`.
        experiment: the data and models of a seed.
        system: the system.
        settings: with which it was scored.
        most: rows of each side under each attack on the input.
        folder: of the trained adapter.
    """
    train, scored = split_rows(experiment, None)
    model = stored(system.kind, experiment, train, settings, folder)
    position = settings.get("position", "start")
    found: Any
    if name == "inputs":
        found = [
            {"side": side, "attack": attack, **row_scores(model, rows, experiment, position)}
            for side, attack, rows in attacked_rows(experiment, scored, most)
        ]
    elif name == "four_bit":
        found = four_bit(experiment, model, system, scored, position, folder)
    else:
        found = relearned(experiment, model, system, scored["forget"], position)
    return {"settings": settings, name: found}


def attacked_rows(experiment: Experiment, scored: Rows, most: int) -> Iterator[tuple[str, str, Dataset]]:
    """Side, attack and rows: some as asked, and under each attack on the input that changes them."""
    for side, rows in scored.items():
        rows = rows.select(range(min(most, len(rows))))
        yield side, "none", rows
        for attack, changed in under_attacks(experiment, scored, side, rows, min(most, len(scored["retain"]) // 2)):
            yield side, attack, changed


def under_attacks(
    experiment: Experiment, scored: Rows, side: str, rows: Dataset, first: int
) -> Iterator[tuple[str, Dataset]]:
    """Name and rows of each attack on the input that changes rows of a side.

    Args:
        experiment: the data of a seed.
        scored: the rows of both sides, of which attacks take others.
        side: of the rows.
        rows: to be attacked.
        first: of the retain rows that dilute them; those before are attacked themselves.
    """
    filler = scored["retain"].select(range(first, len(scored["retain"])))
    other = scored["retain" if side == "forget" else "forget"]
    seed, field = experiment.setup.seed, experiment.data.format.text_field
    attacks = usual_attacks(field, filler, seed, names=SST2_FORGET_NAMES, other_rows=other)
    for (name, level), attack in checked_attacks(attacks).items():
        with contextlib.suppress(UnchangedError):
            yield name if level is None else f"{name}, {level} turns", attack(rows)


def four_bit(experiment: Experiment, model: Any, system: System, scored: Rows, position: str, folder: Path) -> Record:
    """Scores over weights in 4-bit NF4: a prompt's on the quantized base, else the quantized changed model's."""
    device: Any = {"": experiment.device}
    if system.kind in ("prompt", "gated"):
        base = quantized(experiment.model_folder("base"), 4, device_map=device)
        changed: Any = prompt_on(base, system.kind, experiment, folder)
    elif system.kind == "lora":
        merged: Any = PeftModel.from_pretrained(experiment.load("base"), folder).merge_and_unload()
        merged.save_pretrained(folder / "merged")
        changed = quantized(folder / "merged", 4, device_map=device)
        (folder / "merged" / "model.safetensors").unlink()
    else:
        changed = model.on(quantized(experiment.model_folder("base"), 4, device_map=device))
    found = {side: means(row_scores(changed, rows, experiment, position)) for side, rows in scored.items()}
    plain = quantized(experiment.model_folder("base"), 4, device_map=device)
    return found | {"base": {side: means(row_scores(plain, rows, experiment)) for side, rows in scored.items()}}


def relearned(experiment: Experiment, model: Any, system: System, forget: Dataset, position: str) -> list[Record]:
    """Accuracy on other forget rows while an attacker trains on a few, at each of several rates."""
    learning = getattr(model, "unlearner", model)
    if system.kind in ("prompt", "gated"):
        for name, parameter in learning.named_parameters():
            parameter.requires_grad_("prompt_encoder" in name)
    few, others = forget.select(range(RELEARNED_ROWS)), forget.select(range(RELEARNED_ROWS, len(forget)))
    few_prompts = set(few["prompt"][:])
    others = others.filter(lambda row: row["prompt"] not in few_prompts)
    collator = collator_of(experiment, position)
    found = []
    for lr in RELEARNING_RATES:
        steps = relearn(
            learning,
            few,
            others,
            collator.encoder,
            lambda _, rows: score_completions(model, rows, collator, experiment.batch_size),
            lr=lr,
            at=RELEARNING_STEPS,
        )
        found += [{"lr": lr, "step": one["step"], "accuracy": one["accuracy"]} for one in steps]
    return found


def clean() -> None:
    """Free what the last job left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
