"""Rows in batches, by their places: of like length, or shuffled without end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

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
