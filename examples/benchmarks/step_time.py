"""How long one training step takes, and how much memory: spul, the published algorithm, and the floor.

python examples/benchmarks/step_time.py --model opt-125m --shapes sst2 yelp

The three run in turn, round after round; ratios are medians of the ratios within a round. Weights are random: time and
memory do not depend on them. Peak memory is over the loaded model, on a CPU each in a process of its own.
"""

from __future__ import annotations

import json
import statistics

from common import (
    SHAPES,
    PeakMemory,
    alternate,
    arguments,
    build_model,
    dtype_of,
    in_fresh_process,
    prompt_config,
    ratio,
    report,
    surroundings,
    write_json,
)
from steps import STEPS


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["sst2", "yelp"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["spul", "plain", "floor"])
    parser.add_argument("--prompt", choices=("prompt-tuning", "p-tuning"), default="p-tuning")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--memory-only", action="store_true", help="no timing; last line of output is JSON")
    parser.add_argument("--epoch-rows", type=int, help="also say what an epoch of so many rows takes (SST-2: 47756)")
    args = parser.parse_args()

    if args.memory_only:
        print(
            json.dumps({shape: {step: peak_memory(args, shape, step) for step in args.steps} for shape in args.shapes})
        )
        return

    records = []
    for name in args.shapes:
        memory = {step: measure_memory(args, name, step) for step in args.steps}
        base = build_model(args.model, args.device, dtype_of(args))
        steps = {step: make_step(args, base, name, step) for step in args.steps}
        seconds = alternate(steps, args.rounds, args.device)
        for step in args.steps:
            record = {"shape": name, "step": step, "seconds": statistics.median(seconds[step])}
            record |= {"all_seconds": seconds[step], **memory[step]}
            records.append(record)
            if args.epoch_rows:
                record["epoch_seconds"] = record["seconds"] * args.epoch_rows / SHAPES[name].batch_size
        for above, below in (("plain", "spul"), ("spul", "floor"), ("spul, live reference", "spul")):
            if above in seconds and below in seconds:
                record = {"shape": name, "ratio": f"{above} / {below}", "time": ratio(seconds[above], seconds[below])}
                peaks = [memory[step]["peak_bytes"] for step in (above, below)]
                records.append({**record, "memory": peaks[0] / max(peaks[1], 1)})

    where = {**surroundings(args), "prompt": args.prompt, "p": args.num_virtual_tokens}
    timed = [r for r in records if "step" in r]
    columns = ["shape", "step", "seconds", "peak memory over the model (MB)", "with the model (MB)"]
    columns += ["seconds per epoch"] if args.epoch_rows else []
    lines = [
        [r["shape"], r["step"], r["seconds"], r["peak_bytes"] / 1e6, (r["loaded_bytes"] + r["peak_bytes"]) / 1e6]
        for r in timed
    ]
    lines = [line + ([r["epoch_seconds"]] if args.epoch_rows else []) for line, r in zip(lines, timed, strict=True)]
    report("One training step", where, columns, lines)
    ratios = [[r["shape"], r["ratio"], r["time"], r["memory"]] for r in records if "ratio" in r]
    report("Ratios", where, ["shape", "ratio", "time", "peak memory"], ratios)
    write_json(args.json, {"where": where, "records": records})


def make_step(args, base, shape: str, step: str):
    return STEPS[step](base, prompt_config(args.prompt, args.num_virtual_tokens), SHAPES[shape])


def peak_memory(args, shape: str, step: str) -> dict[str, int]:
    """Bytes of the loaded model (on a CPU of the whole process), and over them, in this process."""
    base = build_model(args.model, args.device, dtype_of(args))
    call = make_step(args, base, shape, step)
    with PeakMemory(args.device) as peak:
        for _ in range(3):
            call()
    return {"loaded_bytes": peak.before, "peak_bytes": peak.bytes}


def measure_memory(args, shape: str, step: str) -> dict[str, int]:
    """On a CPU in a fresh process, whose peak is its own; on a GPU the allocator can tell right here."""
    if args.device != "cpu":
        return peak_memory(args, shape, step)
    options = ["--memory-only", "--model", args.model, "--device", "cpu", "--shapes", shape, "--steps", step]
    options += ["--prompt", args.prompt, "--num-virtual-tokens", str(args.num_virtual_tokens)]
    options += ["--dtype", args.dtype] if args.dtype else []
    return in_fresh_process(__file__, options)[shape][step]


if __name__ == "__main__":
    main()
