"""Inference time under a prompt: classification and generation, compared with the base alone and with plain PEFT.

python examples/benchmarks/inference.py --model opt-125m --shape sst2

Classification reads the logits at the last token of each row; so does `PEFT, last logits`. `PEFT` computes
those of every position, as its forward does by default. spul runs inside `cached_prompts()`, and once more outside it,
where the prompt has a pass in each call; `spul, at the message` has it inside every row. Generation is greedy, on rows
of one length.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import common
import torch
from peft import PeftModelForCausalLM
from steps import on_device

from spul import SoftPromptUnlearner


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="sst2")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--generate-rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()

    shape, base = common.SHAPES[args.shape], common.build_model(args.model, args.device, common.dtype_of(args))
    vocab_size = base.config.vocab_size
    batch = on_device(common.make_collator(shape, vocab_size)(common.make_rows(shape, vocab_size)), base)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
    config = common.prompt_config("prompt-tuning", args.num_virtual_tokens)
    peft: Any = PeftModelForCausalLM(base, copy.deepcopy(config)).to(args.device).eval()
    unlearner = SoftPromptUnlearner(base, config).to(args.device).eval()
    uncached = SoftPromptUnlearner(base, copy.deepcopy(config)).to(args.device).eval()
    inside = SoftPromptUnlearner(base, copy.deepcopy(config), prompt_position="message").to(args.device).eval()
    num_virtual = args.num_virtual_tokens

    classify: dict[str, Callable[[], Any]] = {
        "base": lambda: base(**inputs, logits_to_keep=last, use_cache=False),
        "PEFT": lambda: peft(**inputs, use_cache=False),
        "PEFT, last logits": lambda: peft(**inputs, use_cache=False, logits_to_keep=last + num_virtual),
        "spul, a pass each": lambda: uncached.response_logits(**inputs, positions=last),
        "spul": lambda: unlearner.response_logits(**inputs, positions=last),
        "spul, at the message": lambda: inside.response_logits(
            **inputs, positions=last, prompt_position=before[: len(last)]
        ),
    }
    before = torch.full((max(len(last), args.generate_rows),), common.BEFORE_MESSAGE, device=base.device)
    ids = torch.randint(5, vocab_size, (args.generate_rows, shape.max_tokens), device=base.device)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1}
    asked |= {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    generate: dict[str, Callable[[], Any]] = {
        "base": lambda: base.generate(**asked),
        "PEFT": lambda: peft.generate(**asked),
        "spul, a pass each": lambda: uncached.generate(**asked),
        "spul": lambda: unlearner.generate(**asked),
        "spul, at the message": lambda: inside.generate(**asked, prompt_position=before[: len(ids)]),
    }

    records = []
    with torch.no_grad(), unlearner.cached_prompts():
        for task, variants, rows in (("classify", classify, shape.batch_size), ("generate", generate, len(ids))):
            seconds = common.alternate(variants, args.rounds, args.device)
            for name, times in seconds.items():
                record = {"task": task, "model": name, "seconds": statistics.median(times), "all_seconds": times}
                record |= {
                    "rows_per_second": rows / record["seconds"],
                    "over_base": common.ratio(times, seconds["base"]),
                }
                records.append(record)

    where = {**common.surroundings(args), "shape": args.shape, "p": num_virtual, "new tokens": args.new_tokens}
    columns = ["task", "model", "seconds", "rows per second", "time over base"]
    lines = [[r["task"], r["model"], r["seconds"], r["rows_per_second"], r["over_base"]] for r in records]
    common.report("Inference under a prompt", where, columns, lines)
    common.write_json(args.json, {"where": where, "records": records})


if __name__ == "__main__":
    main()
