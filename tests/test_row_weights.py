"""Weights of rows: how often each is drawn, by every sampler."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_collator, make_dataset
from torch.utils.data import DataLoader

from spul.data.dataset import forget_retain_dataset
from spul.data.row_weights import num_in_pass, passes, sampling_weights, weighted_draws
from spul.data.samplers import (
    AlternatingSampler,
    ForgetFractionSampler,
    LengthGroupedSampler,
    RowCopies,
    WeightedSampler,
    epoch_sampler,
)

WEIGHTS = [
    [1.0] * 7,
    [3.0, 1.0, 1.0, 2.0, 5.0],
    [0.5] * 6,
    [0.1] * 30,
    [2.5, 0.25, 1.0, 1.0, 0.75],
    [1e-6, 1.0],
    [1e-12],
    [0.3, 7.7, 1.1, 1.1],
    [100.0, 0.01, 0.01],
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_by_one(weights, num, seed):
    """The draws along the line of weights, each looked for from its start."""
    draws = generator(seed)
    order = torch.randperm(len(weights), generator=draws).tolist()
    first = (torch.randint(2**20, (1,), generator=draws).item() + 0.5) / 2**20
    found = []
    for i in range(num):
        point, end = (i + first) * sum(weights) / num, 0.0
        for row in order:
            end += weights[row]
            if point < end:
                found.append(row)
                break
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
def test_draws_are_those_found_one_by_one(weights):
    for seed in range(20):
        num = num_in_pass(np.arange(len(weights)), np.array(weights))
        drawn = weighted_draws(np.array(weights), num, generator(seed)).tolist()
        assert drawn == one_by_one(weights, num, seed)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_row_has_its_share_of_a_pass_rounded_up_or_down(weights):
    num = num_in_pass(np.arange(len(weights)), np.array(weights))
    assert num == max(1, math.ceil(sum(weights) - 1e-9))
    for seed in range(50):
        counts = Counter(weighted_draws(np.array(weights), num, generator(seed)).tolist())
        assert counts.total() == num
        for row, weight in enumerate(weights):
            share = weight * num / sum(weights)
            assert math.floor(share + 1e-9) <= counts[row] <= math.ceil(share - 1e-9)


def test_whole_weights_are_exact_numbers_of_draws():
    weights = [3, 1, 1, 2, 5] * 200
    for seed in range(5):
        counts = Counter(WeightedSampler(weights, seed))
        found = [sum(counts[draw] for draw in counts if draw % 1000 == row) for row in range(1000)]
        assert found == weights


def test_parts_of_a_draw_come_up_in_as_many_of_the_passes():
    weights, num_passes = np.array([0.5, 0.25, 1.5, 2.0, 0.75]), 4000
    drawn = np.concatenate(list(itertools.islice(passes(np.arange(5), weights, 5, generator()), num_passes)))
    assert np.bincount(drawn % 5) / num_passes == pytest.approx(weights, abs=0.02)


def test_rows_with_parts_are_drawn_independently_of_their_neighbors():
    """In the order of the rows, one of two neighbors of weight one half would always be drawn without the other."""
    together = 0
    for seed in range(400):
        drawn = set(weighted_draws(np.full(6, 0.5), 3, generator(seed)).tolist())
        together += {0, 1} <= drawn
    assert together / 400 == pytest.approx(1 / 5, abs=0.05)  # of 15 pairs, 3 are in a draw of three


@pytest.mark.parametrize("weights", WEIGHTS)
def test_copies_of_a_row_are_numbered_from_zero_through_all_passes_and_none_comes_twice(weights):
    num_rows, group = len(weights) + 4, np.arange(len(weights)) + 3
    padded = np.array([9.0] * 3 + weights + [9.0])
    found = itertools.islice(passes(group, padded, num_rows, generator()), 20)
    copies: dict[int, list[int]] = {}
    for draw in np.concatenate(list(found)).tolist():
        copies.setdefault(draw % num_rows, []).append(draw // num_rows)
    assert copies.keys() <= set(group.tolist())
    assert all(sorted(some) == list(range(len(some))) for some in copies.values())


# ---- samplers ----


FLAGS = [True, False, False, True, False, False]
OF = [1, 4, 1, 1, 2, 1]  # retain rows 8, forget rows 2
LENGTHS = [3, 9, 4, 1, 5, 2]


def counts_of(of):
    return [sum(draw % of.num_rows == row for draw in of) for row in range(of.num_rows)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_shares_of_an_epoch_are_exact_in_every_sampler(lengths):
    weighted = WeightedSampler(OF, 3, lengths, 2)
    alternating = AlternatingSampler(FLAGS, 3, lengths, 2, OF)
    fraction = ForgetFractionSampler(FLAGS, 0.5, 3, lengths, 2, OF)
    assert counts_of(weighted) == counts_of(alternating) == OF
    assert counts_of(fraction) == [4, 4, 1, 4, 2, 1]  # eight retain draws, and as many forget draws
    for of, num in ((weighted, 10), (alternating, 10), (fraction, 16)):
        assert len(of) == len(list(of)) == num
        assert of.draws_copies
        assert len(set(of)) == num
    assert [FLAGS[draw % 6] for draw in alternating] == [False] * 8 + [True] * 2
    drawn = list(fraction)
    assert all(FLAGS[one % 6] != FLAGS[other % 6] for one, other in zip(drawn[::2], drawn[1::2], strict=True))


@pytest.mark.parametrize("make", [
    lambda seed: WeightedSampler([1.5, 0.5, 1, 3] * 9, seed),
    lambda seed: AlternatingSampler([True, False, False, True] * 9, seed, weights=[1.5, 0.5, 1, 3] * 9),
    lambda seed: ForgetFractionSampler([True, False, False, True] * 9, 0.3, seed, weights=[1.5, 0.5, 1, 3] * 9),
])  # fmt: skip
def test_seed_and_epoch_decide_the_draws(make):
    of = make(1)
    epochs = []
    for epoch in (0, 1, 0):
        of.set_epoch(epoch)
        epochs.append(list(of))
    assert epochs[0] == epochs[2] == list(make(1))
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(make(2))
    assert len(epochs[0]) == len(epochs[1]) == len(of)


def test_any_window_holds_its_share_of_forget_rows_whatever_their_weights():
    flags, weights = [True, False, False] * 10, [1, 3, 0.5] * 10
    of = ForgetFractionSampler(flags, 0.25, weights=weights)
    drawn = [flags[draw % 30] for draw in of]
    for start in range(len(drawn) - 8):
        assert sum(drawn[start : start + 8]) == 2


def test_a_weighted_share_draws_its_passes_one_by_one():
    of = ForgetFractionSampler([True, False] * 500, 1e-9, weights=[1, 2] * 500)
    assert len(of) == pytest.approx(500 / 1e-9)
    assert len(list(itertools.islice(of, 5000))) == 5000


def test_weights_of_1_change_nothing():
    rows = make_dataset(3, 5)
    same = rows.add_column("sampling_weight", [1.0] * 8)
    encoder, flags = make_collator().encoder, rows["is_forget"][:]
    assert sampling_weights(same) is None
    assert epoch_sampler(same, flags, encoder) is None
    for settings in ({"alternate": True}, {"forget_fraction": 0.5}, {"strategy": "group_by_length"}):
        with_weights, without = (epoch_sampler(some, flags, encoder, **settings) for some in (same, rows))
        assert list(with_weights) == list(without)
        assert with_weights.draws_copies == ("forget_fraction" in settings)


def test_the_column_decides_the_sampler():
    rows = make_dataset(2, 4).add_column("sampling_weight", OF).add_column("length", LENGTHS)
    encoder, flags = make_collator().encoder, rows["is_forget"][:]
    for settings, expected in (
        ({}, WeightedSampler(OF, 7)),
        ({"alternate": True}, AlternatingSampler(flags, 7, weights=OF)),
        ({"forget_fraction": 0.25}, ForgetFractionSampler(flags, 0.25, 7, weights=OF)),
        ({"strategy": "group_by_length"}, WeightedSampler(OF, 7, LENGTHS, 2)),
    ):
        for some in (rows, list(rows)):
            if some is rows or "strategy" not in settings:
                found = epoch_sampler(some, flags, encoder, seed=7, batch_size=2, **settings)
                assert type(found) is type(expected)
                assert list(found) == list(expected)
    assert isinstance(
        epoch_sampler(rows.remove_columns("sampling_weight"), flags, encoder, strategy="group_by_length"),
        LengthGroupedSampler,
    )


def test_lengths_bring_long_rows_together():
    weights, lengths = [1, 2, 3] * 100, list(range(300))
    grouped = list(WeightedSampler(weights, 0, lengths, 10))
    assert sorted(grouped) == sorted(WeightedSampler(weights, 0))
    batches = np.array([lengths[draw % 300] for draw in grouped]).reshape(-1, 10)
    assert np.mean(batches.max(axis=1) - batches.min(axis=1)) < 60  # shuffled, about 250


# ---- a loop of one's own ----


def test_a_plain_loader_shows_rows_as_often_as_their_weights_say():
    forget, retain = (make_dataset(3, 4).filter(lambda row, flag=flag: row["is_forget"] == flag) for flag in (1, 0))
    dataset = forget_retain_dataset(forget, retain, retain_weight=[1, 5, 2, 1])
    sampler = WeightedSampler(dataset["sampling_weight"], seed=2)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        collator = make_collator()
        collator.set_epoch(epoch)
        loader = DataLoader(RowCopies(dataset), batch_size=4, sampler=sampler, collate_fn=collator)
        batches = list(loader)
        assert Counter(torch.cat([batch["row_id"] for batch in batches]).tolist()) == {
            **dict.fromkeys((0, 1, 2, 3, 6), 1),
            4: 5,
            5: 2,
        }
        epochs.append([batch["labels"].tolist() for batch in batches])
    assert epochs[0] == epochs[2] != epochs[1]


def test_forget_rows_that_repeat_get_generic_completions_of_their_own():
    forget, retain = (make_dataset(1, 1).filter(lambda row, flag=flag: row["is_forget"] == flag) for flag in (1, 0))
    dataset = forget_retain_dataset(forget.add_column("sampling_weight", [40.0]), retain)
    collator = make_collator()
    batches = DataLoader(
        RowCopies(dataset), batch_size=41, sampler=WeightedSampler(dataset["sampling_weight"]), collate_fn=collator
    )
    (batch,) = batches
    assert len({tuple(row) for row in batch["labels"][batch["is_forget"]].tolist()}) > 1


# ---- bad input ----


@pytest.mark.parametrize("bad", [0, -0.5, math.nan, math.inf, None])
def test_a_bad_weight_of_the_column_is_refused_by_its_row(bad):
    values = [1.0, 2.0, bad]
    rows = Dataset.from_dict({"is_forget": [True, False, False], "sampling_weight": values})
    for some in (rows, list(rows)):
        with pytest.raises(ValueError, match="row 2 of train_dataset has the weight"):
            sampling_weights(some)
    with pytest.raises(ValueError, match="row 2 of the training set has the weight"):
        WeightedSampler(values)


def test_a_weight_beyond_all_floats_is_refused():
    with pytest.raises(ValueError, match="row 1 of the training set has the weight 10"):
        WeightedSampler([1.0, 10**400])


def test_rows_of_which_only_some_have_a_weight_are_refused():
    rows = [{"is_forget": True, "sampling_weight": 2.0}, {"is_forget": False}]
    with pytest.raises(ValueError, match="row 1 of train_dataset has the weight None"):
        sampling_weights(rows)
    assert sampling_weights([{"is_forget": True}]) is None


def test_weights_that_are_not_one_per_row_or_too_large_are_refused():
    with pytest.raises(ValueError, match="3 weights for 4 rows"):
        ForgetFractionSampler([True, False] * 2, 0.5, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="3 lengths for 4 rows"):
        WeightedSampler([1, 2, 3, 4], lengths=[1, 2, 3])
    with pytest.raises(ValueError, match=r"2 rows sum to 1e\+12.*Divide the weights"):
        WeightedSampler([1e12, 1])
