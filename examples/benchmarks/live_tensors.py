"""Peak memory of the tensors that are alive in a training step: of spul, without a prompt (the floor), and estimated.

python examples/benchmarks/live_tensors.py --models cpu-20m opt-125m --shapes sst2 yelp --gradient-checkpointing

Counted by the sizes of their storages, so that allocators, loaded code and the setup of a step play no part. The
weights, the cached reference and the optimizer's state are not among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch
from steps import STEPS

import spul
from spul.models.compat_checkpointing import switch_checkpointing
from spul.models.compat_devices import TensorMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=common.MODELS, default=["cpu-20m", "opt-125m"])
    parser.add_argument("--shapes", nargs="+", choices=common.SHAPES, default=["sst2", "yelp"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["spul", "spul, concatenated", "floor"])
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    records = []
    for model in args.models:
        for shape in args.shapes:
            peaks = {step: peak(args, model, shape, step) for step in args.steps}
            peaks["estimate"] = estimated(args, model, shape)
            for step, num_bytes in peaks.items():
                record = {"model": model, "shape": shape, "step": step, "peak_bytes": num_bytes}
                if "floor" in peaks:
                    record["memory / floor"] = num_bytes / peaks["floor"]
                records.append(record)
    where = {"dtype": "float32", "torch": torch.__version__, "p": args.num_virtual_tokens}
    where["gradient_checkpointing"] = args.gradient_checkpointing
    columns = ["model", "shape", "step", "MB", *(["memory / floor"] if "floor" in args.steps else [])]
    lines = [
        [r["model"], r["shape"], r["step"], r["peak_bytes"] / 1e6, *([r[name] for name in columns[4:]])]
        for r in records
    ]
    common.report("Tensors alive in a step", where, columns, lines)
    common.write_json(args.json, {"where": where, "records": records})


def peak(args: Any, model: str, shape: str, step: str) -> int:
    """Bytes of the tensors that a step holds at its peak, after one that is not counted."""
    base = common.build_model(model, "cpu", torch.float32)
    call = STEPS[step](base, common.prompt_config("p-tuning", args.num_virtual_tokens), common.SHAPES[shape])
    base.train()
    if args.gradient_checkpointing:
        switch_checkpointing(base, "enable", {"use_reentrant": False})
    call()
    with TensorMemory(base.config.vocab_size, (*base.parameters(), *base.buffers())) as memory:
        call()
    return memory.peak + memory.peak_of_last


def estimated(args: Any, model: str, name: str) -> int:
    """Bytes that `spul.estimate_memory` expects of the same."""
    shape = common.SHAPES[name]
    found = spul.estimate_memory(
        common.MODELS[model](),
        shape.batch_size,
        shape.max_tokens,
        prompt_config=common.prompt_config("p-tuning", args.num_virtual_tokens),
        response_tokens=shape.response_tokens,
        retain_rows=shape.batch_size - shape.forget_rows,
        dtype=torch.float32,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    return found.activations + found.logits + found.reference


if __name__ == "__main__":
    main()
