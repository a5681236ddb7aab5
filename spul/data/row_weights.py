"""Weights of rows: how often each is drawn, where others are drawn once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..records.fields import is_finite_number
from .rows import column_values

WEIGHT = "sampling_weight"  # their column
# Draws of a weighted pass, which are in memory together.
MAX_DRAWS = 2**28


def checked_weights(values: Iterable[Any], name: str) -> np.ndarray:
    """Weights as floats, (rows,).

    Args:
        values: one per row, of Python, numpy or torch.
        name: the rows' name in messages.

    Raises:
        ValueError: if one is not a finite number above 0.
    """
    weights = []
    for i, value in enumerate(values):
        if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) and value.ndim == 0:
            value = value.item()
        if not is_finite_number(value) or value <= 0:
            raise ValueError(
                f"row {i} of {name} has the weight {value!r}; expected a number above 0: how often the row is drawn, "
                "where others are drawn once."
            )
        weights.append(float(value))
    return np.array(weights)


def sampling_weights(rows: Any) -> np.ndarray | None:
    """The column `sampling_weight` of training rows, in a data set or any sequence; None without one, or if all are 1.

    Raises:
        ValueError: if only some rows have a weight, or one is not a finite number above 0.
    """
    if hasattr(rows, "column_names"):
        if WEIGHT not in rows.column_names:
            return None
        values = column_values(rows, WEIGHT)
    else:
        values = [row.get(WEIGHT) for row in rows]
        if all(value is None for value in values):
            return None
    weights = checked_weights(values, "train_dataset")
    return None if (weights == 1).all() else weights


def num_in_pass(group: np.ndarray, weights: np.ndarray | None) -> int:
    """Number of draws of one pass over rows: their number, or the sum of their weights, rounded up.

    Args:
        group: indices of the rows.
        weights: those of all rows, or None.

    Raises:
        ValueError: if there are too many.
    """
    if weights is None:
        return len(group)
    total = math.fsum(weights[group])
    if total > MAX_DRAWS:
        raise ValueError(
            f"the weights of {len(group)} rows sum to {total:.3g}, and a pass over them would have as many draws; "
            f"expected at most {MAX_DRAWS}. Divide the weights: only their ratios decide how often rows are drawn."
        )
    return max(1, math.ceil(total - 1e-9))  # 30 times 0.1 is a little above 3 in binary floats


def passes(
    group: np.ndarray, weights: np.ndarray | None, num_rows: int, generator: torch.Generator
) -> Iterator[np.ndarray]:
    """One pass over rows after the other without end, each the draws in it, not yet shuffled.

    Args:
        group: indices of the rows.
        weights: those of all rows, as in `weighted_draws`; None draws each row of the group once in a pass.
        num_rows: number of all rows.
        generator: for weighted draws.

    Yields:
        Items of `RowCopies`: `row + copy * num_rows`, the copies of a row numbered from 0 through all passes.
    """
    if weights is None:
        yield from (group + copy * num_rows for copy in itertools.count())
        return
    own, num = weights[group], num_in_pass(group, weights)
    copies = np.zeros(len(group), dtype=np.int64)  # of each row in earlier passes
    while True:
        drawn = np.sort(weighted_draws(own, num, generator))
        again = np.arange(num) - np.searchsorted(drawn, drawn)  # 0 for a row's first draw in this pass, then 1
        yield group[drawn] + (copies[drawn] + again) * num_rows
        copies += np.bincount(drawn, minlength=len(group))


def weighted_draws(weights: np.ndarray, num: int, generator: torch.Generator) -> np.ndarray:
    """Draw rows in proportion to weights: each its share of the draws, rounded up or down, and on average exactly.

    The weights, in random order, lie end to end on a line, and points at equal distances pick them.

    Args:
        weights: one per row, above 0.
        num: number of draws.
        generator: draws the order, and the place of the first point.

    Returns:
        Indices of rows, (num,), those of a row together.

    Source: systematic sampling, Madow, *On the Theory of Systematic Sampling, II*, Annals of Mathematical Statistics
        20 (1949)
    """
    order = torch.randperm(len(weights), generator=generator).numpy()
    ends = np.cumsum(weights[order])
    # Never quite 0 or 1, so that rows of whole weights have exactly so many draws.
    first = (int(torch.randint(2**20, (1,), generator=generator)) + 0.5) / 2**20
    points = (np.arange(num) + first) * (ends[-1] / num)
    return order[np.searchsorted(ends, points, side="right")]
