"""Small rows, files and splits for the tests of known data sets."""

from __future__ import annotations

import gzip
import json

from datasets import Dataset

from spul.data.formats import SENTIMENT
from spul.data.unlearning_data import SPLITS, UnlearningData


def review(text: str, label: int = 1) -> dict:
    return {"text": text, "label": label, "label_text": ["negative", "positive"][label]}


def reviews(*texts: str) -> Dataset:
    return Dataset.from_list([review(text) for text in texts])


def small(**splits: Dataset) -> UnlearningData:
    """Two rows in every split, unless given."""
    for split in SPLITS:
        splits.setdefault(split, reviews(f"{split} one", f"{split} two"))
    return UnlearningData("small", splits, SENTIMENT, ("made here",))


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tsv(path, header, rows) -> None:
    text = "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8", newline="\n")


def texts(data: UnlearningData, split: str) -> list[str]:
    return data.splits[split][data.format.text_field][:]


def sizes(data: UnlearningData) -> dict[str, int]:
    return {split: len(rows) for split, rows in data.splits.items()}


def same(one: UnlearningData, other: UnlearningData) -> bool:
    return all(one.splits[split].to_list() == other.splits[split].to_list() for split in SPLITS)
