"""Step time by number of virtual tokens, for spul and for the published algorithm.

python examples/benchmarks/prompt_length.py --model opt-125m --shape sst2
"""

from __future__ import annotations

import statistics

import common
from steps import STEPS


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="sst2")
    parser.add_argument("--lengths", nargs="+", type=int, default=[10, 30, 50, 100])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["spul", "plain"])
    parser.add_argument("--prompt", choices=("prompt-tuning", "p-tuning"), default="p-tuning")
    args = parser.parse_args()

    base = common.build_model(args.model, args.device, common.dtype_of(args))
    variants = {
        f"{step}, p = {p}": STEPS[step](base, common.prompt_config(args.prompt, p), common.SHAPES[args.shape])
        for p in args.lengths
        for step in args.steps
    }
    seconds = common.alternate(variants, args.rounds, args.device)
    shortest = min(args.lengths)
    records = []
    for name, times in seconds.items():
        step, p = name.split(", p = ")
        record = {"step": step, "p": int(p), "seconds": statistics.median(times), "all_seconds": times}
        records.append({**record, "over_shortest": common.ratio(times, seconds[f"{step}, p = {shortest}"])})

    where = {**common.surroundings(args), "shape": args.shape, "prompt": args.prompt}
    columns = ["step", "p", "seconds", f"over p = {shortest}"]
    lines = [[r["step"], str(r["p"]), r["seconds"], r["over_shortest"]] for r in records]
    common.report("Step time by prompt length", where, columns, sorted(lines, key=lambda line: line[0]))
    common.write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
