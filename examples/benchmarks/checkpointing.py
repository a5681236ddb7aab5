"""Time and memory of a training step under gradient checkpointing: a shared prompt, a concatenated one, and the floor.

python examples/benchmarks/checkpointing.py --model cpu-20m --shapes sst2
python examples/benchmarks/checkpointing.py --model llama-2-7b --device cuda --shapes sst2 long --rounds 20

`spul` takes the way that it chooses by device and shape: a pass of its own for the prompt, which all rows share, one
pass with the prompt as a row of the batch, or the prompt in front of every row; each can be named. `floor` is the
batch without a prompt. All under the same checkpointing, in turn; ratios are medians within rounds. Peak memory is
over the loaded model, setup included, each step in a process of its own; on a CPU the resident set, free blocks
returned.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import common
from paper.costs import PeakMemory
from steps import STEPS

from spul.models.compat_checkpointing import switch_checkpointing

NAMES = ("spul", "spul, concatenated", "spul, two passes", "spul, one pass", "floor")


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.set_defaults(model="cpu-20m")
    parser.add_argument("--shapes", nargs="+", choices=common.SHAPES, default=["sst2"])
    parser.add_argument("--steps", nargs="+", choices=NAMES, default=["spul", "spul, concatenated", "floor"])
    parser.add_argument("--prompt", choices=("prompt-tuning", "p-tuning", "prefix-tuning"), default="p-tuning")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    common.add_clock(parser)
    parser.add_argument("--reentrant", action="store_true", help="use_reentrant=True")
    parser.add_argument("--memory-only", action="store_true", help="no timing; last line of output is JSON")
    parser.add_argument("--memory-steps", type=int, default=3, help="steps whose peak memory is measured")
    parser.add_argument("--time-only", action="store_true", help="no memory")
    args = parser.parse_args()
    if args.prompt == "prefix-tuning":
        args.steps = [step for step in args.steps if step in ("spul", "floor")]  # a prefix has no other ways
    if args.memory_only:
        print(
            json.dumps({shape: {step: peak_memory(args, shape, step) for step in args.steps} for shape in args.shapes})
        )
        return

    records: list[dict[str, Any]] = []
    for shape in args.shapes:
        memory = {} if args.time_only else {step: in_process(args, shape, step) for step in args.steps}
        base = common.build_model(args.model, args.device, common.dtype_of(args))
        seconds = common.alternate(
            make_steps(args, base, shape, args.steps), args.rounds, args.device, clock=common.clock_of(args)
        )
        for step in args.steps:
            record: dict[str, Any] = {"shape": shape, "step": step, "seconds": statistics.median(seconds[step])}
            record["all_seconds"] = seconds[step]
            if "floor" in args.steps:
                record["time / floor"] = common.ratio(seconds[step], seconds["floor"])
            if memory:
                record["peak_bytes"] = memory[step]
            if memory and "floor" in args.steps:
                record["memory / floor"] = memory[step] / max(memory["floor"], 1)
            records.append(record)

    where = {**common.surroundings(args), "prompt": args.prompt, "p": args.num_virtual_tokens}
    where |= {"reentrant": args.reentrant, "cpu_seconds": args.cpu_seconds}
    ratios = [name for name in ("time / floor", "memory / floor") if name in records[0]]
    columns = ["shape", "step", "seconds", *(() if args.time_only else ("peak memory over the model (MB)",)), *ratios]
    lines = [
        [r["shape"], r["step"], r["seconds"], *(r[name] / 1e6 for name in ("peak_bytes",) if name in r)]
        + [r[name] for name in ratios]
        for r in records
    ]
    common.report("One training step under gradient checkpointing", where, columns, lines)
    common.write_json(args.json, {"where": where, "records": records})


def make_steps(args: Any, base: Any, shape: str, names: list[str]) -> dict[str, Callable[[], Any]]:
    """The steps, by name, on one base, whose checkpointing is on once all of them are set up."""
    steps: dict[str, Callable[[], Any]] = {}
    for name in names:
        config = common.prompt_config(args.prompt, args.num_virtual_tokens)
        steps[name] = STEPS[name](base, config, common.SHAPES[shape])
    base.train()
    switch_checkpointing(base, "enable", {"use_reentrant": args.reentrant})
    return steps


def peak_memory(args: Any, shape: str, step: str) -> int:
    """Peak bytes of some steps over the loaded model in this process, their setup included."""
    base = common.build_model(args.model, args.device, common.dtype_of(args))
    with PeakMemory(args.device) as peak:
        call = make_steps(args, base, shape, [step])[step]
        for _ in range(args.memory_steps):
            call()
    if peak.bytes is None:
        raise RuntimeError(f"peak memory on {args.device} is measured on Linux only.")
    return peak.bytes


def in_process(args: Any, shape: str, step: str) -> int:
    """`peak_memory` in a process of its own."""
    options = ["--memory-only", "--model", args.model, "--device", args.device, "--shapes", shape, "--steps", step]
    options += ["--prompt", args.prompt, "--num-virtual-tokens", str(args.num_virtual_tokens)]
    options += ["--dtype", args.dtype] if args.dtype else []
    options += ["--memory-steps", str(args.memory_steps)]
    options += ["--reentrant"] if args.reentrant else []
    heap = {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if args.device == "cpu" else {}
    return common.in_fresh_process(__file__, options, **heap)[shape][step]


if __name__ == "__main__":
    main()
