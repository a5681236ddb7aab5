"""The draws of generic completions: uniform, reproducible, and the same in workers."""

from __future__ import annotations

import pytest
import torch
from collated import GENERIC, answers, draws, make_rows, same_share
from datasets import Dataset
from torch.utils.data import DataLoader

from spul import ForgetRetainCollator


@pytest.fixture(scope="module")
def forget_rows() -> Dataset:
    """Three hundred forget rows."""
    return make_rows(300).filter(lambda row: row["is_forget"])


def test_draws_are_uniform(words):
    rows = list(make_rows(3000).select(range(3000)))
    collator = ForgetRetainCollator(words, GENERIC)
    for _ in range(2):
        tokens = [token for (token,) in answers(collator(rows)).values()]
        counts = [tokens.count(token) for token in (14, 15, 16)]
        assert sum(counts) == 3000
        # Chi-square with 2 degrees of freedom: above 18.4 for one seed in ten thousand.
        assert sum((count - 1000) ** 2 / 1000 for count in counts) < 18.4


def test_every_pass_draws_afresh(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    first, second, third = (draws(collator, forget_rows) for _ in range(3))
    for one, other in ((first, second), (second, third), (first, third)):
        assert 0.2 < same_share(one, other) < 0.47  # independent draws of three agree in a third


def test_the_same_seed_draws_the_same_and_another_seed_others(words, forget_rows):
    one, again, other = (ForgetRetainCollator(words, GENERIC, seed=seed) for seed in (3, 3, 4))
    for _ in range(2):
        expected = draws(one, forget_rows)
        assert draws(again, forget_rows) == expected
        assert 0.2 < same_share(draws(other, forget_rows), expected) < 0.47


def test_draws_do_not_depend_on_batch_mates_or_order(words, forget_rows):
    whole, single = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    expected = answers(whole(list(forget_rows)))
    found: dict[int, list[int]] = {}
    for row in forget_rows.shuffle(seed=5):
        found |= answers(single([row]))
    assert found == expected


def test_draws_do_not_depend_on_torchs_random_state(words, forget_rows):
    torch.manual_seed(1)
    expected = draws(ForgetRetainCollator(words, GENERIC), forget_rows)
    torch.manual_seed(2)
    assert draws(ForgetRetainCollator(words, GENERIC), forget_rows) == expected


def test_rows_without_row_ids_draw_by_their_prompts(words, forget_rows):
    rows = list(forget_rows.remove_columns("row_id"))
    one, other = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    batch, backwards = one(rows), other(rows[::-1])
    assert torch.equal(batch["labels"], backwards["labels"].flip(0))
    assert len(batch["labels"].unique()) == 4


def test_copies_of_a_row_draw_apart_and_reproducibly(words, forget_rows):
    rows = list(forget_rows)
    copies = [[{**row, "copy": number} for row in rows] for number in (0, 1)]
    collator, other = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    collator.set_epoch(2)
    other.set_epoch(2)
    first, second = (answers(collator(some)) for some in copies)
    assert 0.2 < same_share(first, second) < 0.47
    assert answers(other(copies[1])) == second  # whichever copy comes first
    assert answers(other(rows)) == first  # a row that is not numbered is the first copy


def test_set_epoch_draws_what_that_epoch_drew(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    epochs = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        epochs.append(draws(collator, forget_rows))
    assert 0.2 < same_share(epochs[0], epochs[1]) < 0.47
    assert 0.2 < same_share(epochs[1], epochs[2]) < 0.47
    collator.set_epoch(1)
    assert draws(collator, forget_rows) == epochs[1]
    fresh = ForgetRetainCollator(words, GENERIC)
    fresh.set_epoch(2)
    assert draws(fresh, forget_rows) == epochs[2]


def test_set_epoch_to_the_same_epoch_begins_it_anew(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    collator.set_epoch(1)
    expected = draws(collator, forget_rows)
    collator.set_epoch(1)
    assert draws(collator, forget_rows) == expected


def test_within_an_epoch_a_row_that_comes_again_draws_afresh(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    collator.set_epoch(0)
    assert 0.2 < same_share(draws(collator, forget_rows), draws(collator, forget_rows)) < 0.47


def test_resample_false_draws_once_per_row(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC, resample=False)
    expected = draws(collator, forget_rows)
    assert len({tuple(answer) for answer in expected.values()}) == 3
    for epoch in range(2):
        collator.set_epoch(epoch)
        assert draws(collator, forget_rows) == expected
    assert draws(collator, forget_rows, num_workers=2) == expected
    assert draws(ForgetRetainCollator(words, GENERIC, resample=False), forget_rows) == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_the_main_process_draws_where_epochs_are_set(words, forget_rows, persistent):
    rows, plain, worked = forget_rows, ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    loader = DataLoader(rows, 8, shuffle=True, collate_fn=worked, num_workers=2, persistent_workers=persistent)
    for epoch in range(3):
        plain.set_epoch(epoch)
        worked.set_epoch(epoch)
        found: dict[int, list[int]] = {}
        for batch in loader:
            found |= answers(batch)
        assert found == draws(plain, rows)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_afresh_in_every_pass_where_no_epochs_are_set(words, forget_rows, persistent):
    torch.manual_seed(0)
    collator = ForgetRetainCollator(words, GENERIC)
    loader = DataLoader(
        forget_rows, 8, shuffle=True, collate_fn=collator, num_workers=2, persistent_workers=persistent
    )
    passes = []
    for _ in range(2):
        passes.append({})
        for batch in loader:
            passes[-1] |= answers(batch)
    assert 0.2 < same_share(*passes) < 0.47
