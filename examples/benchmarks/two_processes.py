"""Tokens per second of the trainer with one process and with two (DDP over gloo), one thread each, in turn.

python examples/benchmarks/two_processes.py --model cpu-20m --shape sst2 --rounds 3

Each process has a batch of the shape, so that two do twice the work of one in a step. The first steps, in which a base
is probed, are not counted, nor is the reference, which is computed before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from spul import SoftPromptUnlearner, UnlearningTrainer

NOT_COUNTED = 2  # steps


class Clock(TrainerCallback):
    """The time of each step's beginning, and of the end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    on_train_end = on_step_begin


def train(args: Any) -> None:
    """Train in this process, one of those that were started; the first prints tokens per second."""
    state, shape = PartialState(cpu=True), common.SHAPES[args.shape]
    base = common.build_model(args.model, "cpu", torch.float32)
    num_rows = shape.batch_size * args.steps * state.num_processes
    rows = common.make_rows(shape, base.config.vocab_size, num_rows)
    for row in rows:  # a batch's share of rows to forget
        row["is_forget"] = row["row_id"] % shape.batch_size < shape.forget_rows
    clock = Clock()
    settings = TrainingArguments(
        args.folder,
        max_steps=args.steps,
        per_device_train_batch_size=shape.batch_size,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    unlearner = SoftPromptUnlearner(base, common.prompt_config("p-tuning", 30))
    collator = common.make_collator(shape, base.config.vocab_size)
    trainer = UnlearningTrainer(
        unlearner,
        settings,
        collator,
        Dataset.from_list(rows),
        callbacks=[clock],
        reference_dir=os.path.join(args.folder, "reference"),
    )
    trainer.train()
    seconds = clock.times[-1] - clock.times[NOT_COUNTED]
    tokens = sum(len(row["input_ids"]) for row in rows) * (args.steps - NOT_COUNTED) / args.steps
    if state.is_main_process:
        print(json.dumps({"seconds": seconds, "tokens_per_second": tokens / seconds}), flush=True)
    state.wait_for_everyone()
    os._exit(0)  # threads of torch.distributed can abort an interpreter that ends


def measured(args: Any, processes: int) -> dict[str, float]:
    """Tokens per second of a number of processes, started anew."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--folder", folder, "--model", args.model, "--shape", args.shape]
        command += ["--steps", str(args.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{processes} processes failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0])


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="sst2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", help="of the trainer, in a process that was started by this program")
    parser.set_defaults(model="cpu-20m", device="cpu", rounds=3)
    args = common.on_a_cpu(parser)
    if args.folder:
        train(args)
    rounds = [{number: measured(args, number) for number in (1, 2)} for _ in range(args.rounds)]
    records = [
        {
            "processes": number,
            "tokens_per_second": statistics.median(one[number]["tokens_per_second"] for one in rounds),
            "all": [one[number] for one in rounds],
        }
        for number in (1, 2)
    ]
    ratio = statistics.median(one[2]["tokens_per_second"] / one[1]["tokens_per_second"] for one in rounds)
    where = {**common.surroundings(args), "shape": args.shape, "cores": os.cpu_count()}
    lines = [[str(r["processes"]), r["tokens_per_second"]] for r in records]
    common.report("Training", where, ["processes", "tokens per second"], lines)
    print(f"\ntwo / one {ratio:.2f}")
    common.write_json(args.json, {"where": where, "records": records, "two / one": ratio})


if __name__ == "__main__":
    main()
