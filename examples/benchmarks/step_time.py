"""Time and memory of one training step: spul, the published algorithm, and a lower bound (the floor).

python examples/benchmarks/step_time.py --model opt-125m --shapes sst2 yelp

The three run in turn; ratios are medians of the ratios within a round. Weights are random: time and memory do not
depend on them. Peak memory is over the loaded model, measured in separate processes. On a CPU it is the resident set,
measured twice: with blocks of a megabyte or more returned when freed, which is the need of the step, and with the
default heap of the C library, which adds unused memory between blocks. The seconds of an epoch exclude the pass that
computes the reference. Operators are those of torch in a step, views included.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import common
from paper.costs import PeakMemory
from steps import STEPS
from torch.utils._python_dispatch import TorchDispatchMode

MEMORY = {
    "peak_bytes": "peak memory over the model",
    "default_heap_bytes": "the same, default heap",
    "total_bytes": "with the model",
}


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=common.SHAPES, default=["sst2", "yelp"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["spul", "plain", "floor"])
    parser.add_argument("--prompt", choices=("prompt-tuning", "p-tuning", "prefix-tuning"), default="p-tuning")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--memory-only", action="store_true", help="no timing; last line of output is JSON")
    parser.add_argument("--time-only", action="store_true", help="no memory")
    parser.add_argument("--epoch-rows", type=int, help="rows of an epoch, to report its seconds (SST-2: 47756)")
    args = parser.parse_args()

    if args.memory_only:
        print(
            json.dumps({shape: {step: peak_memory(args, shape, step) for step in args.steps} for shape in args.shapes})
        )
        return

    records = []
    for name in args.shapes:
        memory = {step: {} if args.time_only else measure_memory(args, name, step) for step in args.steps}
        base = common.build_model(args.model, args.device, common.dtype_of(args))
        steps = {step: make_step(args, base, name, step) for step in args.steps}
        operators = {step: num_operators(call) for step, call in steps.items()}
        seconds = common.alternate(steps, args.rounds, args.device)
        for step in args.steps:
            record = {"shape": name, "step": step, "seconds": statistics.median(seconds[step])}
            record["operators"] = operators[step]
            record |= {"all_seconds": seconds[step], **memory[step]}
            records.append(record)
            if args.epoch_rows:
                record["epoch_seconds"] = record["seconds"] * args.epoch_rows / common.SHAPES[name].batch_size
        for above, below in (
            ("plain", "spul"),
            ("spul", "floor"),
            ("spul, live reference", "spul"),
            ("spul, at the message", "spul"),
            ("spul, one pass", "spul"),
            ("spul, two passes", "spul"),
            ("plain", "spul, at the message"),
            ("spul", "plain"),
        ):
            if above in seconds and below in seconds:
                record = {
                    "shape": name,
                    "ratio": f"{above} / {below}",
                    "time": common.ratio(seconds[above], seconds[below]),
                }
                for field in memory[above]:
                    record[field] = memory[above][field] / max(memory[below][field], 1)
                records.append(record)

    where = {**common.surroundings(args), "prompt": args.prompt, "p": args.num_virtual_tokens}
    timed = [r for r in records if "step" in r]
    memory_columns = [field for field in MEMORY if field in timed[0]]
    timing = ["shape", "step", "operators", "seconds"]
    columns = [*timing, *(f"{MEMORY[field]} (MB)" for field in memory_columns)]
    columns += ["seconds per epoch"] if args.epoch_rows else []
    lines = [
        [r["shape"], r["step"], r["operators"], r["seconds"], *(r[field] / 1e6 for field in memory_columns)]
        for r in timed
    ]
    lines = [line + ([r["epoch_seconds"]] if args.epoch_rows else []) for line, r in zip(lines, timed, strict=True)]
    common.report("One training step", where, columns, lines)
    ratios = [r for r in records if "ratio" in r]
    fields = [field for field in memory_columns if field != "total_bytes"]
    lines = [[r["shape"], r["ratio"], r["time"], *(r[field] for field in fields)] for r in ratios]
    common.report("Ratios", where, ["shape", "ratio", "time", *(MEMORY[field] for field in fields)], lines)
    common.write_json(args.json, {"where": where, "records": records})


def num_operators(call: Callable[[], Any]) -> int:
    """Operators of torch in a call, forward and backward: on a GPU, each is launched."""
    call()  # the first one probes the base, and makes the optimizer's state
    with _Counting() as counting:
        call()
    return counting.num


class _Counting(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def make_step(args, base, shape: str, step: str):
    return STEPS[step](base, common.prompt_config(args.prompt, args.num_virtual_tokens), common.SHAPES[shape])


def peak_memory(args, shape: str, step: str) -> dict[str, int]:
    """Peak bytes over the loaded model in this process, the setup of the step included."""
    base = common.build_model(args.model, args.device, common.dtype_of(args))
    with PeakMemory(args.device) as peak:
        call = make_step(args, base, shape, step)
        for _ in range(3):
            call()
    if peak.bytes is None:
        raise RuntimeError(f"peak memory on {args.device} is measured on Linux only.")
    return {"peak_bytes": peak.bytes, "total_bytes": peak.before + peak.bytes}


def measure_memory(args, shape: str, step: str) -> dict[str, int]:
    """Peak memory, measured in a separate process; on a CPU in two, with and without returning freed blocks."""
    options = ["--memory-only", "--model", args.model, "--device", args.device, "--shapes", shape, "--steps", step]
    options += ["--prompt", args.prompt, "--num-virtual-tokens", str(args.num_virtual_tokens)]
    options += ["--dtype", args.dtype] if args.dtype else []
    if args.device != "cpu":
        return common.in_fresh_process(__file__, options)[shape][step]
    needed = common.in_fresh_process(__file__, options, MALLOC_MMAP_THRESHOLD_=str(2**20))[shape][step]
    default = common.in_fresh_process(__file__, options)[shape][step]
    return {"peak_bytes": needed["peak_bytes"], "default_heap_bytes": default["peak_bytes"]}


if __name__ == "__main__":
    main()
