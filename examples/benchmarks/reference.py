"""Bytes and seconds of the reference: spul's cache of hidden states against full-vocabulary logits.

python examples/benchmarks/reference.py --model opt-1.3b --dtype bfloat16 --rows 64

`logits` is the published program's way: logits at all positions, those at the response tokens kept in float32 by row
and written to a file; in batches of the same size.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from common import (
    SHAPES,
    arguments,
    build_model,
    dtype_of,
    make_collator,
    make_rows,
    prompt_config,
    report,
    surroundings,
    write_json,
)
from steps import on_device
from tqdm.auto import tqdm

from spul import ReferenceCache, SoftPromptUnlearner


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="sst2")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    args.rounds = 1

    shape, base = SHAPES[args.shape], build_model(args.model, args.device, dtype_of(args))
    vocab_size = base.config.vocab_size
    rows, collator = make_rows(shape, vocab_size, args.rows), make_collator(shape, vocab_size)
    unlearner = SoftPromptUnlearner(base, prompt_config("prompt-tuning", 30))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ReferenceCache.build(unlearner, rows, collator, Path(folder, "cache"), args.batch_size)
        seconds = {"hidden states (spul)": time.perf_counter() - start}
        size = {"hidden states (spul)": sum(path.stat().st_size for path in Path(folder, "cache").iterdir())}

        start = time.perf_counter()
        kept = {}
        with torch.no_grad():
            retain = [i for i, row in enumerate(rows) if not row["is_forget"]]
            for start_row in tqdm(range(0, len(retain), args.batch_size), "logits", leave=False):
                some = retain[start_row : start_row + args.batch_size]
                batch = on_device(collator([rows[i] for i in some]), base)
                logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
                is_response = batch["labels"][:, 1:] != -100
                kept |= {i: logits[b][is_response[b]].float().cpu() for b, i in enumerate(some)}
        torch.save(kept, Path(folder, "logits.pt"))
        seconds["logits"] = time.perf_counter() - start
        size["logits"] = Path(folder, "logits.pt").stat().st_size

    tokens = len(kept) * shape.response_tokens
    where = {**surroundings(args), "shape": args.shape, "retain rows": len(kept)}
    records = [
        {"reference": name, "bytes_per_token": size[name] / tokens, "seconds_per_1000_rows": 1000 * s / len(kept)}
        for name, s in seconds.items()
    ]
    columns = ["reference", "bytes per response token", "seconds per 1000 rows"]
    report("The reference", where, columns, [list(record.values()) for record in records])
    print(f"\nlogits / hidden states: {size['logits'] / size['hidden states (spul)']:.1f} times the bytes")
    write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
