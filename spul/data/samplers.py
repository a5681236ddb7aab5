"""Samplers: order and number of forget and retain rows in an epoch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from ..models.compat import get_length_grouped_indices
from .checks import whole_number
from .encoder import RowEncoder
from .row_weights import WEIGHT, checked_weights, num_in_pass, passes, sampling_weights
from .rows import ROWS_READ_AT_ONCE, column_values, read_rows


class RowCopies(Dataset):
    """Data set whose rows can be drawn several times in an epoch: item `row + copy * len` is that copy of the row.

    The number of the copy is in the row's column `copy`, so that the collator draws another generic completion for it.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        copy, row = divmod(int(item), len(self.rows))
        return {**self.rows[row], "copy": copy}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each row once; without it, iterating would go on with one copy after another."""
        return (self[i] for i in range(len(self)))


class EpochSampler(Sampler[int]):
    """Base of the samplers: an epoch is a pass over each group of rows, one group after the other.

    The order depends on seed and epoch alone, so that a resumed run continues with it.

    Args:
        groups: indices of the rows of each group; every row is in one of them.
        seed: seed of the shuffles.
        lengths: one per row, in tokens, to group rows of similar length; None does not group.
        batch_size: rows per step, for grouping.
        weights: one per row, above 0: how often it is drawn where others are drawn once. A pass over rows of total
            weight W has N = W draws, rounded up, of which a row of weight w has w N / W, rounded up or down, and on
            average exactly. None draws each row once.

    Attributes:
        draws_copies: whether the draws are items of `RowCopies(rows)`, since rows repeat in an epoch; otherwise they
            are indices of rows.

    Raises:
        ValueError: if `lengths` or `weights` are not one per row, or a weight is not finite and above 0.
    """

    draws_copies = False

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        seed: int,
        lengths: Sequence[int] | None,
        batch_size: int,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        num_rows = sum(map(len, groups))
        for name, values in (("lengths", lengths), ("weights", weights)):
            if values is not None and len(values) != num_rows:
                raise ValueError(f"there are {len(values)} {name} for {num_rows} rows; expected one for each.")
        self.seed, self.lengths, self.batch_size, self.epoch = seed, lengths, batch_size, 0
        self.groups, self.num_rows = groups, num_rows
        self.weights = None if weights is None else checked_weights(weights, "the training set")
        if weights is not None:
            self.draws_copies = True
        self._num_in_pass = [num_in_pass(group, self.weights) for group in groups]

    def __len__(self) -> int:
        return sum(self._num_in_pass)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return self._draws(torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch))

    def _draws(self, generator: torch.Generator) -> Iterator[int]:
        """The draws of one epoch."""
        for group in self.groups:
            yield from self._shuffled(next(self._passes(group, generator)), generator)

    def _shuffled(self, draws: np.ndarray, generator: torch.Generator) -> Iterator[int]:
        """These draws in random order, or grouped by length as in transformers."""
        if self.lengths is None:
            yield from _permuted(draws, generator)
        else:
            lengths = [self._length(draw) for draw in draws.tolist()]
            yield from draws[get_length_grouped_indices(lengths, self.batch_size, generator=generator)].tolist()

    def _length(self, draw: int) -> int:
        assert self.lengths is not None
        return self.lengths[draw % self.num_rows]

    def _passes(self, group: np.ndarray, generator: torch.Generator) -> Iterator[np.ndarray]:
        """Passes over these rows without end, each the draws in it."""
        return passes(group, self.weights, self.num_rows, generator)


class ForgetFractionSampler(EpochSampler):
    """Sampler with a fixed share of forget rows in every batch, whatever its size.

    The two groups are shuffled separately and interleaved evenly: any `b` consecutive draws hold `b * fraction` forget
    rows, rounded up or down (with `lengths`: any batch). An epoch lasts until the group that is drawn more slowly was
    seen once; the other repeats, reshuffled each time. The draws are items of `RowCopies`.

    Args:
        is_forget: one flag per row.
        fraction: share of forget rows, above 0 and below 1.
        seed: seed of the shuffles.
        lengths: one per row, in tokens, to group rows of similar length: in each quarter of an epoch, or each 50
            batches if that is less, both groups are sorted by length, and the batches come in random order.
        batch_size: rows per step; used with `lengths` only.
        weights: one per row, how often it is drawn among the rows of its group, as in `EpochSampler`.

    Raises:
        ValueError: if `fraction` is out of range, or so extreme that the draws of an epoch cannot be counted; if a
            group has no rows, or `lengths` or `weights` are not one per row.
    """

    draws_copies = True

    def __init__(
        self,
        is_forget: Sequence[bool],
        fraction: float,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        if isinstance(fraction, (bool, str)) or not 0 < fraction < 1:
            raise ValueError(
                f"forget_fraction={fraction!r}; expected a share above 0 and below 1, or None to mix as the data are."
            )
        groups = _groups(is_forget, f"forget_fraction={fraction!r}")
        super().__init__(groups, seed, lengths, batch_size, weights)
        self.fraction = fraction
        retain, forget = self._num_in_pass
        # 1 / (1 - 0.9) is a little above 10 in binary floats.
        draws = max(forget / fraction - 1e-9, retain / (1 - fraction) - 1e-9)
        if draws >= sys.maxsize:
            raise ValueError(
                f"forget_fraction={fraction!r} with {forget} forget and {retain} retain rows: an epoch would have "
                f"{draws:.3g} draws, more than can be counted. Take a share that is less extreme."
            )
        self._num_draws = math.ceil(draws)

    def __len__(self) -> int:
        return self._num_draws

    def _draws(self, generator: torch.Generator) -> Iterator[int]:
        draws = [self._endless(group, generator) for group in self.groups]
        # An epoch of a small share has far more draws than rows: they are made one by one, or sorted in parts.
        if self.lengths is None:
            for i in range(len(self)):
                yield next(draws[self._is_forget(i)])
            return
        size = self._mega_batch()
        for start in range(0, len(self), size):
            flags = [self._is_forget(i) for i in range(start, min(start + size, len(self)))]
            drawn: list[list[int]] = [[], []]
            for is_forget in flags:
                drawn[is_forget].append(next(draws[is_forget]))
            in_order = [iter(sorted(group, key=self._length, reverse=True)) for group in drawn]
            rows = [next(in_order[is_forget]) for is_forget in flags]
            yield from self._shuffled_batches(rows, generator)

    def _is_forget(self, draw: int) -> bool:
        """Whether this draw of an epoch is a forget row."""
        # The small summand keeps shares such as 0.1, which binary floats miss, from rounding down.
        return math.floor((draw + 1) * self.fraction + 1e-9) > math.floor(draw * self.fraction + 1e-9)

    def _shuffled_batches(self, rows: Sequence[int], generator: torch.Generator) -> list[int]:
        """Whole batches in random order, since training would otherwise go from long rows to short ones repeatedly."""
        whole = len(rows) - len(rows) % self.batch_size
        starts = torch.arange(0, whole, self.batch_size)[torch.randperm(whole // self.batch_size, generator=generator)]
        batches = [rows[start : start + self.batch_size] for start in starts.tolist()]
        return [row for batch in batches for row in batch] + list(rows[whole:])

    def _mega_batch(self) -> int:
        """Number of draws that are sorted together: a quarter of the epoch, or 50 batches, as in transformers."""
        return self.batch_size * max(1, min(len(self) // (4 * self.batch_size), 50))

    def _endless(self, group: np.ndarray, generator: torch.Generator) -> Iterator[int]:
        for draws in self._passes(group, generator):
            yield from _permuted(draws, generator)


class WeightedSampler(EpochSampler):
    """Sampler of rows as often as their weights say, shuffled; an epoch is one pass.

    The draws are items of `RowCopies`.

    Args:
        weights: one per row, as in `EpochSampler`; the column `sampling_weight` of `forget_retain_dataset`.
        seed: seed of the shuffles.
        lengths: one per row, in tokens, to group rows of similar length, as in `LengthGroupedSampler`.
        batch_size: rows per step; used with `lengths` only.

    Raises:
        ValueError: if a weight is not finite and above 0, or `lengths` are not one per row.

    Example:
        ```python
        sampler = WeightedSampler(dataset["sampling_weight"])
        loader = DataLoader(RowCopies(dataset), batch_size=32, sampler=sampler, collate_fn=collator)
        ```
    """

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__([np.arange(len(weights))], seed, lengths, batch_size, weights)


class LengthGroupedSampler(EpochSampler):
    """Sampler of every row once an epoch, shuffled and grouped by length as in transformers.

    Args:
        lengths: one per row, in tokens.
        batch_size: rows per step.
        seed: seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        super().__init__([np.arange(len(lengths))], seed, lengths, batch_size)


class AlternatingSampler(EpochSampler):
    """Sampler of one pass over the retain rows, then one over the forget rows; an epoch is one of each.

    Args:
        is_forget: one flag per row.
        seed: seed of the shuffles.
        lengths: one per row, in tokens, to group rows of similar length, as in `LengthGroupedSampler`.
        batch_size: rows per step; used with `lengths` only.
        weights: one per row, how often it is drawn in the pass over its group, as in `EpochSampler`; the draws are
            then items of `RowCopies`.

    Raises:
        ValueError: if a group has no rows, or `lengths` or `weights` are not one per row.
    """

    def __init__(
        self,
        is_forget: Sequence[bool],
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        super().__init__(_groups(is_forget, "alternate=True"), seed, lengths, batch_size, weights)


def _permuted(rows: np.ndarray, generator: torch.Generator) -> Iterator[int]:
    """These rows in random order; numbers of Python, which take more memory, are made a part at a time."""
    order = torch.randperm(len(rows), generator=generator)
    return (row for part in order.split(ROWS_READ_AT_ONCE) for row in rows[part.numpy()].tolist())


def _groups(is_forget: Sequence[bool], setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the retain rows and of the forget rows; raises if a group has none."""
    flags = np.fromiter(map(bool, is_forget), bool, len(is_forget))
    retain, forget = (np.flatnonzero(flags == group) for group in (False, True))
    if not len(retain) or not len(forget):
        raise ValueError(
            f"{setting} needs rows of both groups; the data set has {len(forget)} forget and {len(retain)} retain "
            "rows. Leave it out, or join both sets with forget_retain_dataset(forget, retain)."
        )
    return retain, forget


def epoch_sampler(
    rows: Any,
    is_forget: Sequence[bool],
    encoder: RowEncoder,
    *,
    forget_fraction: float | None = None,
    alternate: bool = False,
    strategy: str = "random",
    batch_size: int = 1,
    seed: int = 0,
    length_column: str = "length",
    progress: bool = False,
) -> EpochSampler | None:
    """The sampler for a share of forget rows, alternating groups, weights, length grouping, or a combination.

    Args:
        rows: the training set. Its column `sampling_weight`, if there is one, says how often a row is drawn.
        is_forget: one flag per row.
        encoder: encodes rows to know their lengths.
        forget_fraction: as in `ForgetFractionSampler`; None mixes rows as the data are.
        alternate: whether to take the groups in turn, as in `AlternatingSampler`.
        strategy: `train_sampling_strategy` of `TrainingArguments`; `"group_by_length"` groups rows of similar length.
        batch_size: rows per step.
        seed: seed of the shuffles.
        length_column: column of lengths in tokens, if the rows have one.
        progress: whether to show a progress bar while rows are encoded.

    Returns:
        The sampler; None leaves the choice to `Trainer`.

    Raises:
        ValueError: if `forget_fraction`, `alternate` or weights are combined with another strategy than these two, or
            a weight is not finite and above 0.
    """
    lengths, weights = None, sampling_weights(rows)
    if strategy == "group_by_length":
        lengths = row_lengths(rows, encoder, length_column, progress)
    elif strategy != "random" and (alternate or forget_fraction is not None or weights is not None):
        setting = "alternate=True" if alternate else f"forget_fraction={forget_fraction!r}"
        if not alternate and forget_fraction is None:
            setting = f"the column {WEIGHT}"
        raise ValueError(
            f"{setting} and train_sampling_strategy={strategy!r} both decide which rows are drawn; leave one out, or "
            "take the strategy 'random' or 'group_by_length'."
        )
    if alternate:
        return AlternatingSampler(is_forget, seed, lengths, batch_size, weights)
    if forget_fraction is not None:
        return ForgetFractionSampler(is_forget, forget_fraction, seed, lengths, batch_size, weights)
    if weights is not None:
        return WeightedSampler(weights, seed, lengths, batch_size)
    return None if lengths is None else LengthGroupedSampler(lengths, batch_size, seed)


def row_lengths(rows: Any, encoder: RowEncoder, column: str = "length", progress: bool = False) -> list[int]:
    """Tokens per row: from the column of that name if there is one, else by encoding the rows.

    Raises:
        ValueError: if the column holds something other than numbers of tokens.
    """
    if column in getattr(rows, "column_names", ()):
        lengths = column_values(rows, column)
        numbers = [whole_number(length, bools=False, floats=True) or 0 for length in lengths]
        if bad := [(i, length) for i, length in enumerate(lengths) if numbers[i] < 1]:
            raise ValueError(
                f"{len(bad)} row(s) have no length in the column {column!r}, the first is row {bad[0][0]}: "
                f"{bad[0][1]!r}; expected numbers of tokens, from 1. Drop the column, and lengths are counted."
            )
        return numbers
    bar = tqdm(read_rows(rows), "lengths", total=len(rows), disable=not progress, leave=False)
    return [len(encoder.encode(row)) for row in bar]
