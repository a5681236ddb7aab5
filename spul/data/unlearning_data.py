"""Unlearning task: train and test splits of forget and retain rows, and their prompt format."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .checks import check_side
from .dataset import forget_retain_dataset
from .formats import PromptFormat
from .rows import SHOWN, column_values, normalized, read_rows, shortened

logger = logging.getLogger(__name__)


SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
# Which split keeps a duplicate text: forget before retain, train before test.
PRECEDENCE = ("train_forget", "test_forget", "train_retain", "test_retain")


@dataclass(frozen=True)
class UnlearningData:
    """Data of an unlearning task: four splits and their prompt format.

    Args:
        name: name of the data set.
        splits: a data set for each of `train_retain`, `train_forget`, `test_retain` and `test_forget`, with the
            columns that the format requires.
        format: format of prompts and completions.
        notes: changes made to the data, one line each.
    """

    name: str
    splits: dict[str, Dataset]
    format: PromptFormat
    notes: tuple[str, ...] = ()

    def rows(self, split: str) -> Dataset:
        """The rows of a split in prompt-completion form: `prompt`, `completion` and the text field.

        Raises:
            ValueError: if there is no such split, or it has a column `is_forget` that contradicts its name.
        """
        if split not in self.splits:
            raise ValueError(f"split={split!r}; expected one of {', '.join(self.splits)}.")
        check_side(self.splits[split], split.endswith("_forget"), f"{split} of {self.name}")
        return self.format.apply(self.splits[split])

    def training_set(self) -> Dataset:
        """Both train splits, joined by `forget_retain_dataset`."""
        return forget_retain_dataset(forget=self.rows("train_forget"), retain=self.rows("train_retain"))

    def limited(
        self,
        num_retain: int | None = None,
        num_test: int | None = None,
        seed: int = 0,
        prefer: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> UnlearningData:
        """The data with fewer retain rows, drawn at random; the forget splits stay whole.

        Args:
            num_retain: maximum number of rows of `train_retain`; None for all.
            num_test: maximum number of rows of `test_retain`; None for all.
            seed: seed of the draws.
            prefer: with `num_retain`, a predicate on rows of `train_retain` (dicts, column to value). Rows
                for which it is true are drawn first.

        Raises:
            ValueError: if a number is below 1, or `prefer` is given without `num_retain`.
        """
        if prefer is not None and num_retain is None:
            raise ValueError("prefer selects rows of train_retain to draw first; pass num_retain, too.")
        splits, notes = dict(self.splits), []
        for name, most in (("train_retain", num_retain), ("test_retain", num_test)):
            if most is None:
                continue
            if most < 1:
                raise ValueError(f"a maximum of {most} rows for {name}; expected at least 1.")
            rows = splits[name]
            order = random.Random(seed).sample(range(len(rows)), len(rows))
            note = f"{name}: a random {min(most, len(rows)):,} of {len(rows):,} rows (seed {seed})"
            if prefer is not None and name == "train_retain":
                preferred = {i for i, row in enumerate(read_rows(rows)) if prefer(row)}
                order = [i for i in order if i in preferred] + [i for i in order if i not in preferred]
                note += f", {min(most, len(preferred)):,} of them from the {len(preferred):,} preferred"
            splits[name] = rows.select(order[:most])
            notes.append(note)
        return dataclasses.replace(self, splits=splits, notes=(*self.notes, *notes))

    def with_forget_fraction(self, fraction: float, seed: int = 0) -> UnlearningData:
        """The data with a random share of `train_forget`; the other rows are in no split.

        Unlike `subsample_forget`, which draws before a split is divided, it leaves `test_forget` whole.

        Args:
            fraction: share of the rows, above 0 and at most 1.
            seed: seed of the draw.

        Raises:
            ValueError: if `fraction` is out of range, or so low that no row is left.
        """
        rows = self.splits["train_forget"]
        if not 0 < fraction <= 1 or not round(fraction * len(rows)):
            raise ValueError(
                f"fraction={fraction!r} of the {len(rows):,} rows of train_forget; expected a share above 0 and at "
                "most 1 that leaves at least one row."
            )
        drawn = sorted(random.Random(seed).sample(range(len(rows)), round(fraction * len(rows))))
        note = f"train_forget: a random {len(drawn):,} of {len(rows):,} rows (seed {seed}); the rest is in no split"
        splits = {**self.splits, "train_forget": rows.select(drawn)}
        return dataclasses.replace(self, splits=splits, notes=(*self.notes, note))

    def check(self) -> None:
        """Check the data for errors that would invalidate an experiment.

        Raises:
            TypeError: if `splits` is no dict.
            ValueError: if a split is missing or empty, a text is missing, a row is in two splits, a column `is_forget`
                contradicts a split's name, or the completion of a row is one of the format's generic ones.
        """
        if not isinstance(self.splits, Mapping):
            raise TypeError(
                f"splits are a {type(self.splits).__name__}; expected a dict of the four, as train_test returns it."
            )
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"{self.name} has the splits {sorted(self.splits)}; expected {sorted(SPLITS)}.")
        texts = {}
        for split, rows in self.splits.items():
            if len(rows) == 0:
                raise ValueError(f"{split} of {self.name} is empty; expected at least one row.")
            check_side(rows, split.endswith("_forget"), f"{split} of {self.name}")
            self._check_completions(split, rows)
            texts[split] = set(row_keys(rows, self.format))
        for one, other in itertools.combinations(SPLITS, 2):
            if both := sorted(texts[one] & texts[other]):
                kind = "trained on and tested as unseen"
                if one.split("_")[1] != other.split("_")[1]:
                    kind = "forgotten and retained"
                shown = "; ".join(shortened(repr(key[0])) for key in both[:SHOWN])
                raise ValueError(
                    f"{len(both)} row(s) of {self.name} are in both {one} and {other} and would be {kind} at once: "
                    f"{shown}. Remove them from one."
                )

    def _check_completions(self, split: str, rows: Dataset) -> None:
        generic = {normalized(text) for text in self.format.generic_completions}
        for number, row in enumerate(read_rows(rows)):
            formatted = self.format.row(row)
            if self.format.fields(row)[self.format.text_field] is None or not formatted[self.format.text_field]:
                raise ValueError(
                    f"row {number} of {split} of {self.name} has no text in {self.format.text_field!r}: {row}. Fill "
                    "it in, or drop the row."
                )
            if normalized(formatted["completion"]) in generic:
                raise ValueError(
                    f"row {number} of {split} of {self.name} has the completion {formatted['completion']!r}, one of "
                    f"the format's generic completions {self.format.generic_completions}: a forget row would be "
                    "trained to its own answer. Drop such rows, or use a format with other generic completions."
                )


def row_keys(rows: Dataset, prompts: PromptFormat) -> list[tuple[str, ...]]:
    """Identity of each row: its text and its prompt, or its text and its choices in any order."""
    keys = []
    for row in read_rows(rows):
        fields = prompts.fields(row)
        text = str(fields[prompts.text_field]).strip()
        if "choices" in row:
            keys.append((text, *sorted(map(str, row["choices"]))))
        else:
            keys.append((text, prompts.template.format(**{**fields, prompts.text_field: text})))
    return keys


def without_repeats(parts: dict[str, Dataset], prompts: PromptFormat) -> tuple[dict[str, Dataset], list[str]]:
    """Drop all but the first copy of each repeated row, within a part or across parts.

    Args:
        parts: data sets with the same columns, in order of precedence.
        prompts: their format; rows are compared by `row_keys`.

    Returns:
        The parts, and a note on the number of dropped rows, if any.
    """
    first: dict[tuple[str, ...], Any] = {}
    unique, dropped, disagreeing = {}, [], 0
    for name, rows in parts.items():
        labels = column_values(rows, "label") if "label" in rows.column_names else [None] * len(rows)
        indices = []
        for i, (key, label) in enumerate(zip(row_keys(rows, prompts), labels, strict=True)):
            if key not in first:
                first[key] = label
                indices.append(i)
            else:
                disagreeing += label != first[key]
        unique[name] = rows.select(indices)
        if len(indices) < len(rows):
            dropped.append(f"{name} {len(rows) - len(indices):,}")
    if not dropped:
        return unique, []
    note = f"repeated rows dropped, the first one kept: {', '.join(dropped)}"
    return unique, [note + (f" ({disagreeing:,} of them had another label)" if disagreeing else "")]


def size_note(name: str, found: int, expected: int) -> str:
    """A note on the number of rows read, with a warning if it is not the published one."""
    if found == expected:
        return f"{name}: {found:,} rows"
    note = f"{name}: {found:,} rows, where the published set has {expected:,}"
    logger.warning("%s.", note)
    return note


def checked(name: str, splits: Mapping[str, Dataset], prompts: PromptFormat, notes: list[str]) -> UnlearningData:
    """The data of a known set, checked, with the sizes of its splits among the notes."""
    sizes = ", ".join(f"{split} {len(splits[split]):,}" for split in SPLITS)
    data = UnlearningData(name, {split: splits[split] for split in SPLITS}, prompts, (*notes, sizes))
    data.check()
    return data
