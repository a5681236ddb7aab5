"""How forget and retain rows are mixed when a share is asked for, and how rows of like length meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..models.compat import get_length_grouped_indices
from .collator import ForgetRetainCollator


class RowCopies(Dataset):
    """A data set whose rows can be drawn several times in an epoch: item `row + copy * len` is that copy of the row.

    The copy's number is put into the row, so that the collator draws another generic completion for it.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        copy, row = divmod(int(item), len(self.rows))
        return {**self.rows[row], "copy": copy}


class ForgetFractionSampler(Sampler[int]):
    """Draws rows so that forget rows make up a given share of every batch, whatever its size.

    The two groups are shuffled apart and interleaved evenly: any `b` consecutive draws hold `b * fraction` forget
    rows, rounded up or down (with `lengths`: any batch). An epoch lasts until the group that is drawn more slowly has
    been seen once; the other repeats, reshuffled each time. The draws are those of `RowCopies`.

    Args:
        is_forget: one flag per row.
        fraction: share of forget rows, above 0 and below 1.
        seed: seed of the shuffles.
        lengths: one per row, in tokens; given, rows of like length meet: within each quarter of an epoch, or 50
            batches if that is less, both groups are sorted by it, and the batches come in random order.
        batch_size: rows per step; used with `lengths` only.

    Raises:
        ValueError: if `fraction` is out of range, a group has no rows, or `lengths` are not one per row.
    """

    def __init__(
        self,
        is_forget: Sequence[bool],
        fraction: float,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        if not 0 < fraction < 1:
            raise ValueError(
                f"forget_fraction={fraction!r}; expected a share above 0 and below 1, or None to mix as the data are."
            )
        self.groups = [[i for i, flag in enumerate(is_forget) if bool(flag) == group] for group in (False, True)]
        if not all(self.groups):
            raise ValueError(
                f"forget_fraction={fraction!r} needs rows of both groups; the data set has {len(self.groups[1])} "
                f"forget and {len(self.groups[0])} retain rows."
            )
        if lengths is not None and len(lengths) != len(is_forget):
            raise ValueError(f"there are {len(lengths)} lengths for {len(is_forget)} rows; expected one for each.")
        self.fraction, self.seed, self.epoch, self.num_rows = fraction, seed, 0, len(is_forget)
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        retain, forget = (len(group) for group in self.groups)
        # 1 / (1 - 0.9) is a little above 10 in binary floats.
        return max(math.ceil(forget / self.fraction - 1e-9), math.ceil(retain / (1 - self.fraction) - 1e-9))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        draws = [self._endless(group, generator) for group in self.groups]
        size = len(self) if self.lengths is None else self._mega_batch()
        for start in range(0, len(self), size):
            # The small summand keeps shares such as 0.1, which binary floats miss, from rounding down.
            flags = [
                math.floor((i + 1) * self.fraction + 1e-9) > math.floor(i * self.fraction + 1e-9)
                for i in range(start, min(start + size, len(self)))
            ]
            drawn: list[list[int]] = [[], []]
            for is_forget in flags:
                drawn[is_forget].append(next(draws[is_forget]))
            if self.lengths is not None:
                drawn = [sorted(group, key=self._length, reverse=True) for group in drawn]
            in_order = [iter(group) for group in drawn]
            rows = [next(in_order[is_forget]) for is_forget in flags]
            yield from rows if self.lengths is None else self._shuffled_batches(rows, generator)

    def _shuffled_batches(self, rows: Sequence[int], generator: torch.Generator) -> list[int]:
        """Whole batches in random order, or training would go from long rows to short ones again and again."""
        whole = len(rows) - len(rows) % self.batch_size
        starts = torch.arange(0, whole, self.batch_size)[torch.randperm(whole // self.batch_size, generator=generator)]
        batches = [rows[start : start + self.batch_size] for start in starts.tolist()]
        return [row for batch in batches for row in batch] + list(rows[whole:])

    def _mega_batch(self) -> int:
        """Draws among which lengths are sorted: a quarter of the epoch, or 50 batches, as in transformers."""
        return self.batch_size * max(1, min(len(self) // (4 * self.batch_size), 50))

    def _length(self, draw: int) -> int:
        assert self.lengths is not None
        return self.lengths[draw % self.num_rows]

    def _endless(self, group: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        copy = 0
        while True:
            for place in torch.randperm(len(group), generator=generator).tolist():
                yield group[place] + copy * self.num_rows
            copy += 1


class LengthGroupedRows(Sampler[int]):
    """Every row once an epoch, shuffled so that rows of like length meet, as transformers' length grouping does it.

    The shuffle depends on seed and epoch alone, so that a resumed run goes on with it.

    Args:
        lengths: one per row, in tokens.
        batch_size: rows per step.
        seed: seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class AlternatingRows(Sampler[int]):
    """One pass over the retain rows, then one over the forget rows; an epoch is one of each.

    Args:
        is_forget: one flag per row.
        seed: seed of the shuffles.
        lengths: one per row, in tokens; given, rows of like length meet, as in `LengthGroupedRows`.
        batch_size: rows per step; used with `lengths` only.

    Raises:
        ValueError: if a group has no rows.
    """

    def __init__(
        self, is_forget: Sequence[bool], seed: int = 0, lengths: Sequence[int] | None = None, batch_size: int = 1
    ) -> None:
        self.groups = [[i for i, flag in enumerate(is_forget) if bool(flag) == group] for group in (False, True)]
        if not all(self.groups):
            raise ValueError(
                f"alternate=True needs rows of both groups; the data set has {len(self.groups[1])} forget and "
                f"{len(self.groups[0])} retain rows."
            )
        self.seed, self.epoch, self.lengths, self.batch_size = seed, 0, lengths, batch_size

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        for group in self.groups:
            if self.lengths is None:
                order = torch.randperm(len(group), generator=generator).tolist()
            else:
                lengths = [self.lengths[i] for i in group]
                order = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
            yield from (group[place] for place in order)


EpochSampler = ForgetFractionSampler | LengthGroupedRows | AlternatingRows


def epoch_sampler(
    args: TrainingArguments,
    collator: ForgetRetainCollator,
    rows: Any,
    is_forget: Sequence[bool],
    forget_fraction: float | None,
    alternate: bool = False,
) -> EpochSampler | None:
    """The sampler for a share of forget rows or alternating groups, for length grouping, or for both.

    None leaves the choice to Trainer.

    Raises:
        ValueError: if these and `train_sampling_strategy` contradict each other.
    """
    strategy = args.train_sampling_strategy
    seed = args.seed if args.data_seed is None else args.data_seed
    if strategy == "group_by_length":
        lengths = row_lengths(rows, collator, args.length_column_name, progress=not args.disable_tqdm)
        step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if alternate:
            return AlternatingRows(is_forget, seed, lengths, step_size)
        if forget_fraction is None:
            return LengthGroupedRows(lengths, step_size, seed)
        return ForgetFractionSampler(is_forget, forget_fraction, seed, lengths, step_size)
    if forget_fraction is None and not alternate:
        return None
    if strategy != "random":
        asked = "alternate=True" if alternate else f"forget_fraction={forget_fraction!r}"
        raise ValueError(
            f"{asked} draws the rows itself, and so does train_sampling_strategy={strategy!r}; leave one out. "
            "'random' and 'group_by_length' go with it."
        )
    if alternate:
        return AlternatingRows(is_forget, seed)
    assert forget_fraction is not None
    return ForgetFractionSampler(is_forget, forget_fraction, seed)


def row_lengths(rows: Any, collator: ForgetRetainCollator, column: str, progress: bool = False) -> list[int]:
    """Tokens per row: from the column of that name, if there is one, else by encoding the rows."""
    if column in getattr(rows, "column_names", ()):
        return [int(length) for length in rows[column]]
    lengths = []
    for row in tqdm(rows, "lengths", disable=not progress, leave=False):
        encoded = collator.encoder.encode(row)
        lengths.append(len(encoded.prompt_ids) + len(encoded.completion_ids))
    return lengths


# Above it a batch has fewer rows: memory goes with the padded batch, not with its rows.
TOKENS_PER_ROW = 256


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The places of rows in batches, the longest first: what does not fit in memory fails soon.

    Args:
        lengths: of the rows, in tokens or about that.
        batch_size: the most rows of a batch; padded, a batch has at most 256 times as many tokens, or is one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        num = max(1, min(batch_size, batch_size * TOKENS_PER_ROW // longest))
        yield order[start : start + num]
        start += num


def shuffled(num_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """The places of rows in batches, one shuffled pass after the other; a pass's last batch may be smaller.

    Args:
        num_rows: how many rows there are, at least 1.
        batch_size: rows of a batch.
        generator: draws the passes, each when it begins.
    """
    while True:
        order = torch.randperm(num_rows, generator=generator).tolist()
        for start in range(0, num_rows, batch_size):
            yield order[start : start + batch_size]
