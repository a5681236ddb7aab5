"""Seconds and memory of scoring many rows: answers, distance from the base, membership.

python examples/benchmarks/evaluate_rows.py --rows 100000

Each measure in a process of its own; peak memory is over the loaded model and rows. The model is tiny, so that what is
measured is all but the model: rows read, tokenized, batched and collected.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import common
from datasets import Dataset
from paper.costs import PeakMemory
from prepare_rows import GENERIC, make_texts

from spul import ForgetRetainCollator, SoftPromptUnlearner
from spul.evaluation.metrics import kl_to, score_completions
from spul.evaluation.metrics.membership import attack_scores

MEASURES = {"answers": "score_completions", "kl": "kl_to", "membership": "attack_scores"}


def make_measures(args: Any, num: int) -> dict[str, Callable[[], Any]]:
    """Each measure of a model under a prompt, on `num` rows."""
    texts = make_texts(num)
    rows = Dataset.from_dict({"prompt": texts, "completion": [f" t{i % 2 + 10}" for i in range(num)]})
    base = common.build_model(args.model, args.device, common.dtype_of(args))
    collator = ForgetRetainCollator(common.make_tokenizer(base.config.vocab_size), GENERIC, max_length=32)
    model = SoftPromptUnlearner(base, common.prompt_config("prompt-tuning", 5)).eval()
    given = {"batch_size": args.batch_size}
    return {
        "answers": lambda: score_completions(model, rows, collator, **given),
        "kl": lambda: kl_to(model, rows, collator.encoder, **given),
        "membership": lambda: attack_scores(model, rows, collator.encoder, **given),
    }


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--in-this-process", action="store_true", help="one measure; last line of output is JSON")
    parser.set_defaults(model="tiny", device="cpu", rounds=1)
    args = parser.parse_args()
    if args.rounds != 1:
        parser.error("--rounds: each measure runs once, in a process of its own.")
    if args.in_this_process:
        make_measures(args, min(args.rows, 1_000))[args.measures[0]]()  # imports, first calls
        call = make_measures(args, args.rows)[args.measures[0]]
        start = time.perf_counter()
        with PeakMemory(args.device) as peak:
            call()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak.bytes}))
        return
    options = ["--in-this-process", "--rows", str(args.rows), "--batch-size", str(args.batch_size)]
    options += ["--model", args.model, "--device", args.device, *(["--dtype", args.dtype] if args.dtype else [])]
    records = [
        {"measure": one, "rows": args.rows, **common.in_fresh_process(__file__, [*options, "--measures", one])}
        for one in args.measures
    ]
    where = {**common.surroundings(args), "batch_size": args.batch_size}
    lines = [
        [MEASURES[r["measure"]], str(r["rows"]), r["seconds"], r["rows"] / r["seconds"], r["peak_bytes"] / 1e6]
        for r in records
    ]
    columns = ["measure", "rows", "seconds", "rows per second", "peak memory, MB"]
    common.report("Scoring rows", where, columns, lines)
    common.write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
