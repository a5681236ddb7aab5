"""Inference time of a batch whose rows have prompts of their own, compared with one prompt for all rows.

python examples/benchmarks/row_prompts.py --model opt-125m --shape sst2

Four prompts of one length, four of different lengths (none longer than the one), and three with a quarter of the rows
under no prompt. Classification reads the logits at the last token of each row; generation is greedy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from steps import on_device

from spul import SoftPromptUnlearner


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="sst2")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    shape, base = common.SHAPES[args.shape], common.build_model(args.model, args.device, common.dtype_of(args))
    vocab_size, longest = base.config.vocab_size, args.num_virtual_tokens
    batch = on_device(common.make_collator(shape, vocab_size)(common.make_rows(shape, vocab_size)), base)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    last, rows = batch["attention_mask"].sum(dim=1, keepdim=True) - 1, shape.batch_size
    unlearner = SoftPromptUnlearner(base, common.prompt_config("prompt-tuning", longest))
    for i in (1, 2, 3):
        unlearner.add_adapter(f"same-{i}", common.prompt_config("prompt-tuning", longest))
        unlearner.add_adapter(f"other-{i}", common.prompt_config("prompt-tuning", max(1, longest * i // 4)))
    unlearner.to(args.device).eval()
    names = {
        "one prompt": None,
        "four prompts": ["default", "same-1", "same-2", "same-3"],
        "four lengths": ["default", "other-1", "other-2", "other-3"],
        "three and none": ["default", "other-1", "other-2", "__base__"],
    }
    by_row = {name: None if four is None else [four[i % 4] for i in range(rows)] for name, four in names.items()}
    asked = {
        "do_sample": False,
        "pad_token_id": 1,
        "min_new_tokens": args.new_tokens,
        "max_new_tokens": args.new_tokens,
    }
    tasks: dict[str, dict[str, Callable[[], Any]]] = {
        "classify": {
            name: partial(unlearner.response_logits, **inputs, positions=last, adapter_names=own)
            for name, own in by_row.items()
        },
        "generate": {
            name: partial(unlearner.generate, **inputs, **asked, adapter_names=own) for name, own in by_row.items()
        },
    }
    records = []
    with torch.no_grad(), unlearner.cached_prompts():
        for task, variants in tasks.items():
            for run in variants.values():
                run()  # the probes, and the prompts' own passes
            seconds = common.alternate(variants, args.rounds, args.device)
            for name, times in seconds.items():
                record = {"task": task, "rows": name, "seconds": statistics.median(times), "all_seconds": times}
                records.append(record | {"over_one": common.ratio(times, seconds["one prompt"])})
    where = {**common.surroundings(args), "shape": args.shape, "p": longest, "new tokens": args.new_tokens}
    lines = [[r["task"], r["rows"], r["seconds"], r["over_one"]] for r in records]
    common.report("Prompts by row", where, ["task", "prompts", "seconds", "time over one prompt"], lines)
    common.write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
