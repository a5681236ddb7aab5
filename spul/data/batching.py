"""Batches of row indices outside training: of rows of similar length, or shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

# Padded tokens of a batch per row of its maximum size, in `by_length`: memory goes with padded tokens, not with rows.
TOKENS_PER_ROW = 256


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, the longest first, so that one too large for memory fails soon.

    Args:
        lengths: one per row, in tokens or about that.
        batch_size: maximum number of rows in a batch. Padded, a batch has at most 256 times as many tokens, unless it
            is a single row.

    Yields:
        Row indices of a batch.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1 row.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        num = max(1, min(batch_size, batch_size * TOKENS_PER_ROW // longest))
        yield order[start : start + num]
        start += num


def shuffled(num_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of rows, one shuffled pass after the other without end; the last batch of a pass may be smaller.

    Args:
        num_rows: number of rows, at least 1.
        batch_size: rows per batch.
        generator: draws the order of each pass at its start.

    Yields:
        Row indices of a batch.
    """
    while True:
        order = torch.randperm(num_rows, generator=generator).tolist()
        for start in range(0, num_rows, batch_size):
            yield order[start : start + batch_size]
