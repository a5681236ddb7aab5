"""Rows for tests of the collator, and what its batches hold."""

from __future__ import annotations

import itertools

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from spul import ForgetRetainCollator
from spul.data.dataset import forget_retain_dataset

GENERIC = [" n", " u", " z"]


def make_rows(num_forget: int, num_retain: int = 1) -> Dataset:
    """Prompts of five words, all different."""
    prompts = itertools.product("abcdefghij", repeat=4)
    forget = [{"prompt": "f " + " ".join(next(prompts)), "completion": " d"} for _ in range(num_forget)]
    retain = [{"prompt": "g " + " ".join(next(prompts)), "completion": " e"} for _ in range(num_retain)]
    return forget_retain_dataset(Dataset.from_list(forget), Dataset.from_list(retain))


def answers(batch: dict[str, torch.Tensor]) -> dict[int, list[int]]:
    """Row id to the tokens of its response."""
    labels = zip(batch["row_id"].tolist(), batch["labels"], strict=True)
    return {row: label[label != -100].tolist() for row, label in labels}


def draws(collator: ForgetRetainCollator, rows: Dataset, **loader) -> dict[int, list[int]]:
    """One pass over the rows by a data loader: row id to response tokens."""
    found: dict[int, list[int]] = {}
    for batch in DataLoader(rows, batch_size=8, collate_fn=collator, **loader):
        found |= answers(batch)
    return found


def same_share(one: dict, other: dict) -> float:
    return sum(one[row] == other[row] for row in one) / len(one)


def assert_equal_batches(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
