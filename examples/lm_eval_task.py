"""Forget and retain rows as tasks of EleutherAI's lm-evaluation-harness, to score any model or saved prompt on them.

    python examples/lm_eval_task.py --output-dir out/tasks                          # the quick start's test rows
    python examples/lm_eval_task.py --forget forget.jsonl --retain retain.jsonl --generic " unknown"

    lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER \\
        --include_path out/tasks --tasks spul_forget,spul_retain --batch_size 8

The rows are files that `read_file` reads, such as JSON lines, with `prompt` and `completion`. Each task is
multiple choice by log-likelihood: `acc` is the share of rows whose own completion is the likeliest of the choices,
`exact_match` the share whose completion greedy decoding returns, as the accuracy of `score_completions`. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from datasets import Dataset
from toy_reviews import GENERIC, make_splits

from spul.data.checks import check_rows
from spul.data.sources import read_file
from spul.evaluation.metrics.scoring import task_classes


def choice_rows(rows: Dataset, generic: Sequence[str]) -> list[dict[str, str | int | list[str]]]:
    """Rows as multiple choice, with the candidates of `score_completions`.

    Args:
        rows: with `prompt` and `completion`, both text.
        generic: the generic completions.

    Returns:
        For each row its `prompt`, the `choices`, and `answer`, the index of its own completion among these. The
        choices are the labels of the set, or for free-form answers the row's own, and the generic completions.

    Raises:
        ValueError: if there are no rows, or a prompt or completion is missing, empty or no text.
    """
    check_rows(rows)
    for row in rows:
        texts = (row["prompt"], row["completion"])
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"a row has prompt {texts[0]!r} and completion {texts[1]!r}; expected text in both. Conversations are "
                "rendered first, by the tokenizer's chat template."
            )
    labels = task_classes(rows)
    found: list[dict[str, str | int | list[str]]] = []
    for row in rows:
        choices = list(dict.fromkeys([*(labels or [row["completion"]]), *generic]))
        found.append({"prompt": row["prompt"], "choices": choices, "answer": choices.index(row["completion"])})
    return found


def write_task(name: str, rows: Dataset, generic: Sequence[str], folder: Path) -> Path:
    """Write the rows and the YAML file of a task into a folder; return the path of the YAML file.

    Args:
        name: of the task, as `--tasks` takes it.
        rows: see `choice_rows`.
        generic: see `choice_rows`.
        folder: the value of `--include_path`.

    Raises:
        ValueError: as `choice_rows`.
    """
    lines = [json.dumps(row) + "\n" for row in choice_rows(rows, generic)]
    folder.mkdir(parents=True, exist_ok=True)
    data, task = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(lines), encoding="utf-8")
    settings = {
        "task": name,
        "dataset_path": "json",
        # The harness looks for files from where it is started, not from the task's folder.
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        # A completion begins with its own space.
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "exact_match")
        ],
        "metadata": {"version": 1.0},
    }
    task.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return task


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", type=Path, help="rows to forget: prompt, completion")
    parser.add_argument("--retain", type=Path, help="rows to retain: prompt, completion")
    parser.add_argument("--generic", nargs="*", default=GENERIC, help="generic responses, leading space included")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up reviews, as the quick start's")
    parser.add_argument("--output-dir", type=Path, default=Path("out/tasks"))
    args = parser.parse_args()
    if (args.forget is None) != (args.retain is None):
        parser.error("--forget and --retain go together: give both, or neither for the made-up reviews.")
    return args


def main() -> None:
    args = parse_args()
    if args.forget is None:
        splits = make_splits(args.seed)
        rows = {"spul_forget": splits["test_forget"], "spul_retain": splits["test_retain"]}
    else:
        rows = {"spul_forget": read_file(args.forget), "spul_retain": read_file(args.retain)}
    for name, split in rows.items():
        print(f"{write_task(name, split, args.generic, args.output_dir)}: {len(split)} rows")


if __name__ == "__main__":
    main()
