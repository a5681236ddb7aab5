"""The memory that `spul.estimate_memory` expects of a step, beside what the step takes.

python examples/benchmarks/memory_estimate.py --models opt-125m cpu-20m gemma-60m --shapes sst2 yelp

Measured is the peak over the loaded model, in a process of its own (see `step_time.py`), and the bytes of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch

import spul


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=common.MODELS, default=["opt-125m", "cpu-20m", "gemma-60m"])
    parser.add_argument("--shapes", nargs="+", choices=common.SHAPES, default=["sst2", "yelp"])
    parser.add_argument("--prompt", choices=("prompt-tuning", "p-tuning"), default="p-tuning")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    records = [compared(args, model, shape) for model in args.models for shape in args.shapes]
    where = {"device": args.device, "dtype": str(common.dtype_of(args)), "torch": torch.__version__}
    fields = ("estimate_bytes", "measured_bytes", "estimated_step_bytes", "measured_step_bytes")
    titles = ["estimate (MB)", "measured (MB)", "without weights (MB)", "measured (MB)"]
    columns = ["model", "shape", *titles, "estimate / measured", "without weights"]
    lines = [
        [r["model"], r["shape"], *(r[field] / 1e6 for field in fields), r["ratio"], r["step_ratio"]] for r in records
    ]
    common.report("Memory of a step", where, columns, lines)
    common.write_json(args.json, {"where": where, "records": records})


def compared(args: Any, model: str, name: str) -> dict[str, Any]:
    """Estimate and measurement of one model at one shape."""
    shape = common.SHAPES[name]
    found = spul.estimate_memory(
        common.MODELS[model](),
        shape.batch_size,
        shape.max_tokens,
        prompt_config=common.prompt_config(args.prompt, args.num_virtual_tokens),
        response_tokens=shape.response_tokens,
        retain_rows=shape.batch_size - shape.forget_rows,
        dtype=common.dtype_of(args),
        bits=4 if model.endswith("-nf4") else None,
    )
    options = ["--memory-only", "--model", model, "--device", args.device, "--shapes", name, "--steps", "spul"]
    options += ["--prompt", args.prompt, "--num-virtual-tokens", str(args.num_virtual_tokens)]
    options += ["--dtype", args.dtype] if args.dtype else []
    script = str(Path(__file__).with_name("step_time.py"))
    measured = common.in_fresh_process(script, options, MALLOC_MMAP_THRESHOLD_=str(2**20))[name]["spul"]["peak_bytes"]
    step = found.total - found.weights
    return {
        "model": model,
        "shape": name,
        "estimate_bytes": found.total,
        "measured_bytes": found.weights + measured,
        "estimated_step_bytes": step,
        "measured_step_bytes": measured,
        "ratio": found.total / (found.weights + measured),
        "step_ratio": step / measured,
    }


if __name__ == "__main__":
    main()
