"""Batches of row indices: every row once, none larger than it may be, shuffled anew each pass."""

import itertools
import random

import pytest
import torch

from spul.data.batching import TOKENS_PER_ROW, by_length, shuffled


def test_every_row_is_in_one_batch_and_no_batch_is_larger_than_it_may_be():
    draws = random.Random(0)
    lengths = [draws.choice((3, 50, 256, 700, 9_000)) for _ in range(100)]
    batches = list(by_length(lengths, 8))
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert len(batch) == 1 or (len(batch) <= 8 and padded <= 8 * TOKENS_PER_ROW)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_short_rows_fill_their_batches():
    assert [len(batch) for batch in by_length([5] * 20, 8)] == [8, 8, 4]
    assert list(by_length([], 8)) == []
    assert list(by_length([0, 0], 8)) == [[0, 1]]


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_has_at_least_one_row(size):
    with pytest.raises(ValueError, match=f"batch_size={size}"):
        list(by_length([5], size))


def test_shuffled_passes_hold_every_row_once_and_are_drawn_anew():
    batches = list(itertools.islice(shuffled(7, 3, torch.Generator().manual_seed(0)), 6))
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1]
    first, second = ([i for batch in some for i in batch] for some in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    again = itertools.islice(shuffled(7, 3, torch.Generator().manual_seed(0)), 6)
    assert list(again) == batches
