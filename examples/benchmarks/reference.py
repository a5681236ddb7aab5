"""Bytes and seconds of the cached reference: hidden states (spul) compared with full-vocabulary logits.

python examples/benchmarks/reference.py --model opt-1.3b --dtype bfloat16 --rows 64

`logits` is the method of the published program: logits at all positions, of which those at response tokens are cached
in float32 by row and written to a file; in batches of the same size.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import common
import torch
from steps import on_device

from spul import ReferenceCache, SoftPromptUnlearner


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="sst2")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    shape, base = common.SHAPES[args.shape], common.build_model(args.model, args.device, common.dtype_of(args))
    vocab_size = base.config.vocab_size
    rows, collator = common.make_rows(shape, vocab_size, args.rows), common.make_collator(shape, vocab_size)
    retain = [row for row in rows if not row["is_forget"]]
    unlearner = SoftPromptUnlearner(base, common.prompt_config("prompt-tuning", 30))
    size: dict[str, int] = {}

    def hidden_states() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ReferenceCache.build(unlearner, rows, collator, folder, args.batch_size, progress=False)
            size["hidden states (spul)"] = sum(path.stat().st_size for path in Path(folder).iterdir())

    @torch.no_grad()
    def full_logits() -> None:
        cached = []
        for start in range(0, len(retain), args.batch_size):
            batch = on_device(collator(retain[start : start + args.batch_size]), base)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = base(**inputs, use_cache=False).logits[:, :-1]
            is_response = batch["labels"][:, 1:] != -100
            cached += [row[mask].float().cpu() for row, mask in zip(logits, is_response, strict=True)]
        with tempfile.NamedTemporaryFile() as file:
            torch.save(cached, file.name)
            size["logits"] = Path(file.name).stat().st_size

    variants = {"hidden states (spul)": hidden_states, "logits": full_logits}
    seconds = common.alternate(variants, args.rounds, args.device, warmup=1)
    tokens = len(retain) * shape.response_tokens
    where = {**common.surroundings(args), "shape": args.shape, "retain rows": len(retain)}
    records = [
        {
            "reference": name,
            "bytes_per_token": size[name] / tokens,
            "seconds_per_1000_rows": 1000 * statistics.median(times) / len(retain),
        }
        for name, times in seconds.items()
    ]
    columns = ["reference", "bytes per response token", "seconds per 1000 rows"]
    common.report("The reference", where, columns, [list(record.values()) for record in records])
    print(f"\nlogits / hidden states: {size['logits'] / size['hidden states (spul)']:.1f} times the bytes")
    common.write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
