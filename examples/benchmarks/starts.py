"""Distance of fresh prompts from the base, by kind and start: KL in nats per response token, before the first step.

    python examples/benchmarks/starts.py --base SmolLM2-135M-Instruct --rows sst2/dev.tsv --json starts.json

The rows are a tab-separated file of the columns sentence and label (0 or 1), named in its first line, such as GLUE's
SST-2. The start "near" is chosen on the rows that follow the measured ones.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import report, write_json
from datasets import Dataset
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from spul import ForgetRetainCollator, SoftPromptUnlearner
from spul.data.formats import SENTIMENT
from spul.losses.positions import response_positions
from spul.prompts import InstructionStart, NearStart

KINDS: dict[str, Callable[[int], PeftConfig]] = {
    "prompt tuning": lambda p: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
    "P-tuning": lambda p: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=128),
    "prefix tuning": lambda p: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
    "prefix tuning, projected": lambda p: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, prefix_projection=True
    ),
}
INSTRUCTION = "Decline to answer about the people named in the review; answer everything else as usual."
COLUMNS = ("kind", "position", "start", "seed", "KL(prompted || base)", "KL(base || prompted)", "loss")


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = make_rows(args.rows, args.num_rows + args.start_rows)
    measured, others = rows.select(range(args.num_rows)), rows.select(range(args.num_rows, len(rows)))
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    table: list[tuple[Any, ...]] = []
    for position in args.positions:
        collator = make_collator(tokenizer, position)
        batches, reference = make_batches(measured, args.batch_size, collator), None
        starts = {
            "instruction": InstructionStart(INSTRUCTION, tokenizer),
            "near": NearStart(others, collator, num_rows=args.start_rows),
        }
        for kind in args.kinds:
            for start in args.starts:
                for seed in range(args.seeds):
                    set_seed(seed)
                    given = starts.get(start, start)
                    config = KINDS[kind](args.num_virtual_tokens)
                    unlearner = SoftPromptUnlearner(base, config, prompt_position=position, start=given).eval()
                    reference = reference or predictions(unlearner, batches, prompted=False)
                    found = distances(predictions(unlearner, batches), reference)
                    table.append((kind, position, start, seed, *found))
                    print(*table[-1], flush=True)
    where = {"model": args.base.name, "rows": args.num_rows, "virtual tokens": args.num_virtual_tokens}
    where["rows of the start"] = args.start_rows
    report("Fresh prompts and the base, nats per response token", where, COLUMNS, table)
    write_json(args.json, {"where": where, "records": [dict(zip(COLUMNS, row, strict=True)) for row in table]})


def make_rows(path: Path, num_rows: int) -> Dataset:
    """The file's first rows in the format of the sentiment task."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:num_rows]
    labels = ("negative", "positive")
    texts = [{"text": line["sentence"].strip(), "label_text": labels[int(line["label"])]} for line in lines]
    rows = SENTIMENT.apply(Dataset.from_list(texts))
    return rows.add_column("is_forget", [False] * len(rows))


def make_collator(tokenizer: Any, position: str) -> ForgetRetainCollator:
    """The collator of the sentiment task for prompts at a position."""
    return ForgetRetainCollator(
        tokenizer, SENTIMENT.generic_completions, text_field=SENTIMENT.text_field, prompt_position=position
    )


def make_batches(rows: Dataset, batch_size: int, collator: ForgetRetainCollator) -> list[dict[str, Tensor]]:
    """Batches of the rows, those of like length together."""
    by_length = sorted(rows, key=lambda row: len(row["text"]))
    return [collator(by_length[i : i + batch_size]) for i in range(0, len(by_length), batch_size)]


@torch.no_grad()
def predictions(unlearner: SoftPromptUnlearner, batches: list[dict[str, Tensor]], prompted: bool = True) -> list:
    """For each batch the log-probabilities (N, V) at its response tokens, and the tokens (N,)."""
    found = []
    for batch in batches:
        ids, mask, labels = (batch[name].to(unlearner.device) for name in ("input_ids", "attention_mask", "labels"))
        positions, targets = response_positions(labels)
        used = targets != -100
        if prompted:
            logits = unlearner.response_logits(ids, mask, positions, prompt_position=batch.get("prompt_position"))
        else:
            logits = unlearner.base_logits(ids, mask, positions)
        found.append((logits[used].float().log_softmax(-1).cpu(), targets[used].cpu()))
    return found


def distances(prompted: list, reference: list) -> tuple[float, float, float]:
    """Both KLs and the cross-entropy of the true answer, means over response tokens."""
    p, q = (torch.cat([log_probs for log_probs, _ in found]) for found in (prompted, reference))
    targets = torch.cat([tokens for _, tokens in prompted])
    reverse, forward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    return reverse.mean().item(), forward.mean().item(), -p.gather(1, targets[:, None]).mean().item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="folder of a causal LM")
    add("--rows", type=Path, required=True, help="tab-separated file of the columns sentence and label")
    add("--num-rows", type=int, default=64)
    add("--start-rows", type=int, default=32, help="rows on which the start near is chosen")
    add("--batch-size", type=int, default=16)
    add("--num-virtual-tokens", type=int, default=30)
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    add("--positions", nargs="+", choices=("start", "message"), default=["start"], metavar="POSITION")
    starts = ("near", "random", "vocabulary", "instruction", "peft")
    add("--starts", nargs="+", choices=starts, default=list(starts), metavar="START")
    add("--seeds", type=int, default=1)
    add("--device", default="cpu")
    add("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
