"""Worker processes of a measurement: each keeps the data of the seeds that it met."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from paper.experiment import Experiment

from evidence import jobs
from evidence.plan import Plan
from evidence.schedule import Job


@lru_cache(maxsize=8)
def kept_experiment(plan: Path, seed: int, model: str, data_dir: str, folder: Path) -> Experiment:
    return Plan.read(plan).experiment(seed, model, data_dir, folder)


def experiment_of(args: argparse.Namespace, seed: int) -> Experiment:
    return kept_experiment(args.plan, seed, args.model, args.data_dir, args.models_dir or args.output_dir / "models")


def set_up(args: argparse.Namespace) -> None:
    """Settings of a process."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.workers > 1:
        torch.set_num_threads(1)
    if args.tf32:
        torch.set_float32_matmul_precision("high")


def prepare(args: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Read the data of all seeds and load a model, while other workers memorize."""
    set_up(args)
    time.sleep(0.5)  # so that the others get their own workers
    experiment_of(args, seeds[0]).load("vanilla")
    jobs.clean()
    for seed in seeds:
        _ = experiment_of(args, seed).rows


def work(args: argparse.Namespace, job: Job, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Do a job; returns its line.

    Args:
        args: of the command.
        job: the job.
        settings: of a system to score or to attack.
    """
    set_up(args)
    plan, start = Plan.read(args.plan), time.perf_counter()
    experiment = experiment_of(args, job.seed)
    record: dict[str, Any] = {"job": job.key, "seed": job.seed, "system": job.system, "experiment": experiment.digest}
    name = job.system.replace(" ", "-").replace(",", "").replace("+", "-")
    folder = args.output_dir / "adapters" / f"{name}-{job.seed}"
    if job.kind == "memorize":
        record |= jobs.memorized(experiment, job.system)
    elif job.kind == "trial":
        assert isinstance(job.part, int)
        record |= {"candidate": job.part, "rule": plan.rule}
        record |= jobs.trial(plan, experiment, plan.system(job.system), job.part)
    else:
        assert settings is not None
        if job.kind == "score":
            record |= jobs.scores(experiment, plan.system(job.system), settings, folder, plan.test_rows_alone)
        else:
            assert isinstance(job.part, str)
            system, most = plan.system(job.system), args.attacked
            record |= {"attack": job.part, "attacked": most}
            record |= jobs.attack(job.part, experiment, system, settings, most, folder)
    jobs.clean()
    on_gpu = torch.cuda.is_available()
    record |= {"job_seconds": time.perf_counter() - start, "model": Path(args.model).name}
    record |= {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "tf32": args.tf32, "workers": args.workers}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return record
