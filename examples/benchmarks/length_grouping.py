"""Tokens per second of the trainer over padding: rows shuffled, and grouped by length, in turn.

python examples/benchmarks/length_grouping.py --tokenizer NAME --rows ../shared/data/sst2/train.tsv --rounds 1

Rows are as long as the file's sentences in the format of the sentiment task; their tokens are random, since time does
not depend on them. Steps are those of the trainer with a cached reference, which is computed before; the first two, in
which a base is probed, are not counted. The share of padding is also counted over an epoch of the whole file.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainingArguments

from spul import SoftPromptUnlearner, UnlearningTrainer
from spul.data import SENTIMENT
from spul.data.samplers import LengthGroupedSampler

STRATEGIES = ("random", "group_by_length")
NOT_COUNTED = 2  # steps
COLUMNS = ("batches", "tokens per second", "padding, % of tokens computed", "in an epoch of the file, %")


class CountingTrainer(UnlearningTrainer):
    """A trainer that notes when each step began, its tokens, and its tokens with padding."""

    def __init__(self, *args: Any, clock: Callable[[], float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = clock
        self.counted: list[tuple[float, int, int]] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"]
        self.counted.append((self.clock(), int(mask.sum()), mask.numel()))
        return super().training_step(model, inputs, *args, **kwargs)


def main() -> None:
    args = parse_args()
    clock = common.clock_of(args)
    lengths = lengths_of(args.rows, args.tokenizer)
    drawn = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[: args.steps * args.batch_size]
    shape = common.Shape(args.batch_size, max(lengths), response_tokens=1, forget_rows=1)
    with tempfile.TemporaryDirectory() as folder:
        rounds = [
            {
                name: train(args, shape, [lengths[i] for i in drawn.tolist()], name, folder, clock)
                for name in STRATEGIES
            }
            for _ in range(args.rounds)
        ]
    records = [
        {
            "batches": name,
            "tokens_per_second": statistics.median(one[name]["tokens_per_second"] for one in rounds),
            "padding": rounds[0][name]["padding"],
            "padding_of_file": padding_of_epoch(lengths, name, args.batch_size),
            "all": [one[name] for one in rounds],
        }
        for name in STRATEGIES
    ]
    ratio = statistics.median(
        one["group_by_length"]["tokens_per_second"] / one["random"]["tokens_per_second"] for one in rounds
    )
    where = {
        **common.surroundings(args),
        "tokenizer": Path(args.tokenizer).name,
        "rows": len(lengths),
        "tokens": statistics.mean(lengths),
        "steps": args.steps,
        "cpu_seconds": args.cpu_seconds,
    }
    lines = [
        [one["batches"], one["tokens_per_second"], 100 * one["padding"], 100 * one["padding_of_file"]]
        for one in records
    ]
    common.report("Training", where, COLUMNS, lines)
    print(f"\ngrouped / random {ratio:.2f}")
    common.write_json(args.json, {"where": where, "records": records, "grouped / random": ratio})


def lengths_of(path: Path, tokenizer: str) -> list[int]:
    """Tokens of each row of a file in the format of the sentiment task, its label as one."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        texts = Dataset.from_list([{"text": line["sentence"].strip(), "label_text": "positive"} for line in lines])
    prompts = SENTIMENT.apply(texts)["prompt"]
    return [len(ids) + 1 for ids in AutoTokenizer.from_pretrained(tokenizer)(list(prompts))["input_ids"]]


def train(
    args: Any, shape: common.Shape, lengths: Sequence[int], strategy: str, folder: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Tokens per second of an epoch over rows of these lengths, and the share of padding."""
    base = common.build_model(args.model, "cpu", torch.float32)
    draw, vocab_size = torch.Generator().manual_seed(0), base.config.vocab_size
    rows = [
        {
            "input_ids": torch.randint(5, vocab_size - 2, (length,), generator=draw).tolist(),
            "completion_mask": [0] * (length - 1) + [1],
            "is_forget": i % args.batch_size < shape.forget_rows,
            "row_id": i,
        }
        for i, length in enumerate(lengths)
    ]
    settings = TrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy=strategy,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = CountingTrainer(
        SoftPromptUnlearner(base, common.prompt_config("p-tuning", args.num_virtual_tokens)),
        settings,
        common.make_collator(shape, vocab_size),
        Dataset.from_list(rows),
        reference_dir=f"{folder}/reference",
        clock=clock,
    )
    trainer.train()
    counted = trainer.counted[NOT_COUNTED:]
    seconds = clock() - counted[0][0]
    tokens, padded = (sum(one[i] for one in counted) for i in (1, 2))
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "padding": 1 - tokens / padded}


def padding_of_epoch(lengths: Sequence[int], strategy: str, batch_size: int) -> float:
    """The share of padding in the tokens of an epoch."""
    if strategy == "random":
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        order = list(LengthGroupedSampler(lengths, batch_size))
    batches = [[lengths[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def parse_args() -> Any:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="tab-separated file with a column sentence")
    parser.add_argument("--tokenizer", required=True, help="Hub name or folder; of the lengths")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    common.add_clock(parser)
    parser.set_defaults(model="cpu-20m", device="cpu", rounds=1)
    return common.on_a_cpu(parser)


if __name__ == "__main__":
    main()
