"""Samplers: shares of forget rows, groups in turn, rows of similar length; and batches of rows."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import torch
from datasets import Dataset
from helpers import make_tokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

from spul import ForgetRetainCollator
from spul.data.samplers import (
    AlternatingSampler,
    ForgetFractionSampler,
    LengthGroupedSampler,
    RowCopies,
    epoch_sampler,
    row_lengths,
)

# Forget rows, retain rows, share of forget rows.
MIXES = [
    (3, 17, 0.5),
    (17, 3, 0.5),
    (5, 40, 0.1),
    (10, 90, 0.1),
    (7, 20, 0.3),
    (4, 50, 0.25),
    (30, 4, 0.7),
    (9, 9, 1 / 3),
    (2, 31, 0.9),
    (1, 1, 0.5),
    (6, 11, 0.613),
]


def sampler(forget: int, retain: int, fraction: float, seed: int = 0) -> ForgetFractionSampler:
    """The forget rows are not in one block: they are spread over the set from its start."""
    flags = [i % 2 == 0 for i in range(2 * min(forget, retain))]
    flags += [forget > retain] * abs(forget - retain)
    assert (sum(flags), len(flags)) == (forget, forget + retain)
    return ForgetFractionSampler(flags, fraction, seed)


def flags_of(drawn: list[int], of: ForgetFractionSampler) -> list[bool]:
    forget = set(of.groups[True])
    return [draw % of.num_rows in forget for draw in drawn]


@pytest.mark.parametrize(("forget", "retain", "fraction"), MIXES)
def test_any_window_of_draws_holds_its_share_rounded_up_or_down(forget, retain, fraction):
    of = sampler(forget, retain, fraction)
    is_forget = flags_of(list(of), of)
    for width in range(1, len(is_forget) + 1):
        allowed = {math.floor(width * fraction + 1e-9), math.ceil(width * fraction - 1e-9)}
        for start in range(len(is_forget) - width + 1):
            assert sum(is_forget[start : start + width]) in allowed, (start, width)


@pytest.mark.parametrize(("fraction", "batch"), [(0.5, 2), (0.5, 8), (0.1, 10), (0.1, 20), (0.25, 4), (0.7, 10)])
def test_batches_in_which_the_share_is_whole_hold_it_exactly(fraction, batch):
    of = sampler(40, 60, fraction)
    is_forget = flags_of(list(of), of)
    shares = [sum(is_forget[i : i + batch]) for i in range(0, len(is_forget) - batch + 1, batch)]
    assert len(shares) > 3
    assert set(shares) == {round(batch * fraction)}


@pytest.mark.parametrize(("forget", "retain", "fraction"), MIXES)
def test_every_row_is_seen_at_least_once_in_an_epoch(forget, retain, fraction):
    of = sampler(forget, retain, fraction)
    assert {draw % of.num_rows for draw in of} == set(range(forget + retain))


@pytest.mark.parametrize(("forget", "retain", "fraction"), MIXES)
def test_copies_of_a_row_are_numbered_from_zero_and_no_copy_comes_twice(forget, retain, fraction):
    of = sampler(forget, retain, fraction)
    copies: dict[int, list[int]] = {}
    for draw in of:
        copy, row = divmod(draw, of.num_rows)
        copies.setdefault(row, []).append(copy)
    assert all(found == list(range(len(found))) for found in copies.values())


@pytest.mark.parametrize(("forget", "retain", "fraction"), MIXES)
def test_rows_of_a_group_are_seen_equally_often_but_for_one(forget, retain, fraction):
    of = sampler(forget, retain, fraction)
    rows = [draw % of.num_rows for draw in of]
    for group in of.groups:
        counts = [rows.count(row) for row in group]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("forget", "retain", "fraction"), MIXES)
def test_the_length_is_the_number_of_draws(forget, retain, fraction):
    of = sampler(forget, retain, fraction)
    assert len(list(of)) == len(of)


@pytest.mark.parametrize(
    ("forget", "retain", "fraction", "length"),
    [(3, 17, 0.5, 34), (17, 3, 0.5, 34), (10, 90, 0.1, 100), (10, 50, 0.1, 100), (9, 1, 0.9, 10), (7, 3, 0.7, 10)],
)
def test_an_epoch_lasts_until_the_slower_group_was_seen_once(forget, retain, fraction, length):
    assert len(sampler(forget, retain, fraction)) == length


def test_an_epoch_drawn_again_is_the_same_and_another_one_is_shuffled_anew():
    of = sampler(20, 20, 0.5)
    first = list(of)
    assert list(of) == first
    of.set_epoch(1)
    second = list(of)
    assert second != first
    assert sorted(second) == sorted(first)
    of.set_epoch(0)
    assert list(of) == first


def test_a_group_that_repeats_is_reshuffled_each_time():
    of = sampler(10, 40, 0.5)
    forget = [draw % of.num_rows for draw, flag in zip(of, flags_of(list(of), of), strict=True) if flag]
    passes = [tuple(forget[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(drawn) == sorted(of.groups[True]) for drawn in passes)
    assert len(set(passes)) == 4


@pytest.mark.parametrize("lengths", [None, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
def test_groups_in_turn_are_each_seen_once_retain_first(lengths):
    is_forget = [True, False, False, True, False, True, False, False, False, True]
    of = AlternatingSampler(is_forget, seed=3, lengths=lengths, batch_size=2)
    first = list(of)
    assert len(of) == 10
    assert sorted(first[:6]) == [1, 2, 4, 6, 7, 8]
    assert sorted(first[6:]) == [0, 3, 5, 9]
    assert list(of) == first
    of.set_epoch(1)
    assert list(of) != first
    with pytest.raises(ValueError, match="alternate=True needs rows of both groups; the data set has 0 forget and 2"):
        AlternatingSampler([False, False])


def test_the_seed_decides_the_order():
    one, again, other = (list(sampler(20, 20, 0.5, seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_rows_are_shuffled():
    of = sampler(50, 50, 0.5)
    for group in of.groups:
        drawn = [row for row in of if row in set(group)]
        assert drawn != sorted(drawn)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"forget_fraction={fraction!r}; expected a share above 0 and below 1"):
        ForgetFractionSampler([True, False], fraction)


@pytest.mark.parametrize(("flags", "counts"), [([True] * 3, "3 forget and 0"), ([False] * 2, "0 forget and 2")])
def test_a_group_without_rows_is_refused(flags, counts):
    with pytest.raises(ValueError, match=f"needs rows of both groups; the data set has {counts} retain rows"):
        ForgetFractionSampler(flags, 0.5)


def test_row_copies_are_the_rows_with_the_copys_number():
    rows = RowCopies([{"prompt": "a"}, {"prompt": "b"}])
    assert len(rows) == 2
    assert [rows[i] for i in (0, 1, 2, 5)] == [
        {"prompt": "a", "copy": 0},
        {"prompt": "b", "copy": 0},
        {"prompt": "a", "copy": 1},
        {"prompt": "b", "copy": 2},
    ]
    assert rows.rows == [{"prompt": "a"}, {"prompt": "b"}]


def test_every_draw_is_an_item_of_row_copies():
    of = sampler(2, 6, 0.5)
    rows = RowCopies(Dataset.from_list([{"row_id": i} for i in range(8)]))
    items = [rows[draw] for draw in of]
    assert sorted((item["row_id"], item["copy"]) for item in items if item["row_id"] in (0, 2)) == [
        (0, 0),
        (0, 1),
        (0, 2),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert {item["copy"] for item in items if item["row_id"] not in (0, 2)} == {0}


# ---- rows of similar length ----


def padded_tokens(drawn, lengths, batch_size):
    batches = [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]
    return sum(len(batch) * max(lengths[draw % len(lengths)] for draw in batch) for batch in batches)


@pytest.mark.parametrize(("forget", "retain", "fraction"), [(300, 900, 0.25), (100, 900, 0.5), (40, 960, 0.04)])
def test_lengths_change_the_order_within_a_group_and_nothing_else(forget, retain, fraction):
    plain = sampler(forget, retain, fraction)
    flags = flags_of(list(range(plain.num_rows)), plain)
    generator = random.Random(0)
    lengths = [generator.randint(5, 200) for _ in flags]
    grouped = ForgetFractionSampler(flags, fraction, lengths=lengths, batch_size=8)
    before, after = list(plain), list(grouped)
    assert sorted(before) == sorted(after)
    shares = [[sum(flags_of(drawn, plain)[i : i + 8]) for i in range(0, len(drawn), 8)] for drawn in (before, after)]
    assert sorted(shares[0]) == sorted(shares[1])
    assert len(after) == len(grouped)
    assert padded_tokens(after, lengths, 8) < 0.75 * padded_tokens(before, lengths, 8)


def test_batches_of_like_length_come_in_random_order():
    """From long to short and long again, a prompt would end as one for short rows."""
    flags = [True, False] * 400
    lengths = [random.Random(i).randint(5, 200) for i in range(800)]
    drawn = list(ForgetFractionSampler(flags, 0.5, lengths=lengths, batch_size=8))
    means = [sum(lengths[draw % 800] for draw in drawn[i : i + 8]) / 8 for i in range(0, len(drawn), 8)]
    falls = sum(one > other for one, other in itertools.pairwise(means))
    assert 0.3 * len(means) < falls < 0.7 * len(means)


def test_grouped_epochs_differ_and_repeat():
    of = ForgetFractionSampler([True, False] * 20, 0.5, lengths=list(range(40)), batch_size=2)
    alone = LengthGroupedSampler(range(40), batch_size=2, seed=1)
    for each in (of, alone):
        epochs = []
        for epoch in (0, 1, 0):
            each.set_epoch(epoch)
            epochs.append(list(each))
        assert epochs[0] == epochs[2] != epochs[1]
        assert {draw % 40 for draw in epochs[0]} == set(range(40))
    assert list(alone) != list(LengthGroupedSampler(range(40), batch_size=2, seed=2))
    assert len(alone) == 40


def test_grouping_alone_saves_padding():
    generator = random.Random(0)
    lengths = [generator.randint(5, 200) for _ in range(1000)]
    grouped = list(LengthGroupedSampler(lengths, batch_size=8))
    assert padded_tokens(grouped, lengths, 8) < 0.75 * padded_tokens(list(range(1000)), lengths, 8)


def test_lengths_that_are_not_one_per_row_are_refused():
    with pytest.raises(ValueError, match="3 lengths for 4 rows"):
        ForgetFractionSampler([True, False] * 2, 0.5, lengths=[1, 2, 3])


def test_lengths_as_whole_floats_are_lengths():
    found = row_lengths(Dataset.from_dict({"length": [3.0, 12.0]}), None)
    assert found == [3, 12]
    assert set(map(type, found)) == {int}


@pytest.mark.parametrize("length", [None, -1, 0, 0.5, float("nan")])
def test_a_column_without_a_length_is_refused_by_its_row(length):
    rows = Dataset.from_dict({"length": [3, length]})
    with pytest.raises(ValueError, match=r"1 row\(s\) have no length in the column 'length', the first is row 1: "):
        row_lengths(rows, None)


@pytest.mark.parametrize("fraction", ["0.5", True])
def test_a_share_that_is_no_number_is_refused(fraction):
    with pytest.raises(ValueError, match=r"forget_fraction=.*; expected a share above 0 and below 1"):
        ForgetFractionSampler([True, False], fraction)


def test_lengths_come_from_a_column_or_from_the_tokens():
    collator = ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length=20)
    texts = Dataset.from_list(
        [{"prompt": "review " * i, "completion": " good", "is_forget": False} for i in (1, 4, 50)]
    )
    lengths = row_lengths(texts, collator.encoder, "length")
    assert lengths[0] < lengths[1] < lengths[2] == 20
    assert row_lengths(texts.map(collator.tokenize), collator.encoder, "length") == lengths
    assert row_lengths(texts.add_column("length", [7, 8, 9]), collator.encoder, "length") == [7, 8, 9]


def test_the_settings_decide_the_sampler():
    rows = Dataset.from_dict({"is_forget": [True, False] * 4, "tokens": [3, 1, 4, 1, 5, 9, 2, 6]})
    encoder = ForgetRetainCollator(make_tokenizer(), [" neutral"]).encoder

    flags, lengths = rows["is_forget"], rows["tokens"]

    def sampler_for(**settings):
        return epoch_sampler(rows, flags, encoder, seed=3, batch_size=2, length_column="tokens", **settings)

    assert sampler_for() is None
    assert sampler_for(strategy="sequential") is None
    assert list(sampler_for(alternate=True)) == list(AlternatingSampler(flags, 3))
    assert list(sampler_for(forget_fraction=0.25)) == list(ForgetFractionSampler(flags, 0.25, 3))
    for settings, expected in (
        ({}, LengthGroupedSampler(lengths, 2, 3)),
        ({"alternate": True}, AlternatingSampler(flags, 3, lengths, 2)),
        ({"forget_fraction": 0.25}, ForgetFractionSampler(flags, 0.25, 3, lengths, 2)),
    ):
        found = sampler_for(strategy="group_by_length", **settings)
        assert type(found) is type(expected)
        assert list(found) == list(expected)
    with pytest.raises(ValueError, match="alternate=True and train_sampling_strategy='sequential' both decide"):
        sampler_for(alternate=True, strategy="sequential")


def all_draws_at_once(flags, fraction, seed, lengths, batch_size):
    """The draws of an epoch as they were made before they were lazy: all together."""
    generator = torch.Generator().manual_seed(seed)
    groups = [[i for i, flag in enumerate(flags) if flag == group] for group in (False, True)]

    def endless(group):
        copy = 0
        while True:
            for i in torch.randperm(len(group), generator=generator).tolist():
                yield group[i] + copy * len(flags)
            copy += 1

    draws = [endless(group) for group in groups]
    total = max(math.ceil(len(groups[1]) / fraction - 1e-9), math.ceil(len(groups[0]) / (1 - fraction) - 1e-9))
    size = total if lengths is None else batch_size * max(1, min(total // (4 * batch_size), 50))
    found = []
    for start in range(0, total, size):
        kinds = [
            math.floor((i + 1) * fraction + 1e-9) > math.floor(i * fraction + 1e-9)
            for i in range(start, min(start + size, total))
        ]
        drawn = [[], []]
        for kind in kinds:
            drawn[kind].append(next(draws[kind]))
        if lengths is not None:
            drawn = [sorted(group, key=lambda draw: lengths[draw % len(flags)], reverse=True) for group in drawn]
        in_order = [iter(group) for group in drawn]
        rows = [next(in_order[kind]) for kind in kinds]
        if lengths is not None:
            whole = len(rows) - len(rows) % batch_size
            starts = torch.arange(0, whole, batch_size)
            starts = starts[torch.randperm(whole // batch_size, generator=generator)].tolist()
            rows = [row for start in starts for row in rows[start : start + batch_size]] + rows[whole:]
        found += rows
    return found


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("forget", "retain", "fraction"), [(3, 50, 0.1), (50, 3, 0.3), (7, 7, 0.013), (20, 400, 0.5)])
def test_lazy_draws_are_those_of_a_whole_epoch(forget, retain, fraction, grouped):
    flags = random.Random(0).sample([True] * forget + [False] * retain, forget + retain)
    lengths = [random.Random(i).randint(1, 30) for i in range(len(flags))] if grouped else None
    for epoch in (0, 3):
        of = ForgetFractionSampler(flags, fraction, 5, lengths, batch_size=4)
        of.set_epoch(epoch)
        assert list(of) == all_draws_at_once(flags, fraction, 5 + 1_000_003 * epoch, lengths, 4)


def test_rows_in_turn_and_by_length_come_as_before_they_were_lazy():
    flags, generator = [i % 3 == 0 for i in range(10_000)], torch.Generator().manual_seed(2)
    expected = []
    for kind in (False, True):
        group = [i for i, flag in enumerate(flags) if flag == kind]
        expected += [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
    assert list(AlternatingSampler(flags, seed=2)) == expected
    lengths = [i % 7 for i in range(100)]
    expected = get_length_grouped_indices(lengths, 4, generator=torch.Generator().manual_seed(2))
    assert list(LengthGroupedSampler(lengths, 4, seed=2)) == expected


@pytest.mark.parametrize("fraction", [1e-9, 0.001, 0.999])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_first_batch_comes_at_once_whatever_the_share(fraction, batch_size):
    flags = [i % 2 == 0 for i in range(100_000)]
    lengths = None if batch_size is None else [5] * len(flags)
    start = time.perf_counter()
    of = ForgetFractionSampler(flags, fraction, lengths=lengths, batch_size=batch_size or 1)
    assert len(list(itertools.islice(of, 32))) == 32
    assert all(type(draw) is int for draw in itertools.islice(of, 3))
    assert time.perf_counter() - start < 2  # an epoch of it has 5e13, 5e7 or 5e7 draws


def test_a_share_of_more_draws_than_can_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"forget_fraction=1e-300 .* an epoch would have 1e\+300 draws"):
        ForgetFractionSampler([True, False], 1e-300)


def test_iterating_over_row_copies_ends_after_each_row_once():
    assert [row["copy"] for row in RowCopies([{"a": 1}, {"a": 2}])] == [0, 0]
