"""How forget and retain rows are mixed, when a share is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


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
    rows, rounded up or down. An epoch lasts until the group that is drawn more slowly has been seen once; the other
    repeats, reshuffled each time. The draws are those of `RowCopies`.

    Args:
        is_forget: one flag per row.
        fraction: share of forget rows, above 0 and below 1.
        seed: seed of the shuffles.

    Raises:
        ValueError: if `fraction` is out of range, or a group has no rows.
    """

    def __init__(self, is_forget: Sequence[bool], fraction: float, seed: int = 0) -> None:
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
        self.fraction, self.seed, self.epoch, self.num_rows = fraction, seed, 0, len(is_forget)

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
        for i in range(len(self)):
            # The small summand keeps shares such as 0.1, which binary floats miss, from rounding down.
            is_forget = math.floor((i + 1) * self.fraction + 1e-9) > math.floor(i * self.fraction + 1e-9)
            yield next(draws[is_forget])

    def _endless(self, group: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        copy = 0
        while True:
            for place in torch.randperm(len(group), generator=generator).tolist():
                yield group[place] + copy * self.num_rows
            copy += 1


def forget_flags(rows: Any) -> list[bool]:
    """The `is_forget` flags of a training set.

    Raises:
        ValueError: if the rows have none.
    """
    if isinstance(rows, Sized) and hasattr(rows, "column_names"):
        if "is_forget" not in rows.column_names:
            raise ValueError(
                f"train_dataset has the columns {rows.column_names} and no is_forget; make it with "
                "forget_retain_dataset(forget, retain)."
            )
        return [bool(flag) for flag in rows["is_forget"]]  # type: ignore[index]
    return [bool(row["is_forget"]) for row in rows]
