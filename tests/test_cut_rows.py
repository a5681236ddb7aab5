"""Rows that may be cut, against encoding every row."""

import pytest
from datasets import Dataset
from helpers import make_tokenizer

from spul import ForgetRetainCollator
from spul.data import RowEncoder, cut_rows
from spul.data.cut_rows import rows_maybe_cut, surely_fits


@pytest.mark.parametrize("max_length", [12, 20, 40])
def test_rows_that_are_left_out_lose_nothing_and_the_others_come_in_order(max_length):
    rows = [{"prompt": "the film is good " * (i % 7 + 1), "completion": " positive", "row": i} for i in range(40)]
    rows.append({"input_ids": [5] * 30, "completion_mask": [0] * 29 + [1], "row": 40})
    encoder = RowEncoder(make_tokenizer(), max_length=max_length)
    found = [row["row"] for row, stands_for in rows_maybe_cut(encoder, rows, [" neutral"]) if stands_for == 1]
    reserve = len(encoder.completion_ids(" neutral"))
    whole = [encoder.with_max_length(1000).encode(row) for row in rows[:40]]
    needed = [len(one.prompt_ids) + max(reserve, len(one.completion_ids)) + 2 for one in whole]
    maybe = [i for i, num in enumerate(needed) if num > max_length and not surely_fits(encoder, rows[i])]
    assert found == maybe + [40] * (max_length < 30)


def test_a_row_without_texts_is_never_left_out():
    encoder = RowEncoder(make_tokenizer(), max_length=40)
    odd = [
        {"prompt": "", "completion": " positive"},
        {"prompt": [{"role": "user"}], "completion": []},
        {"prompt": "a"},
    ]
    long = [{"prompt": "", "completion": " positive " * 40}]
    assert [row for row, _ in rows_maybe_cut(encoder, [*odd, *long])] == [*odd[1:], *long]


@pytest.mark.parametrize("every", [1, 4])
def test_of_many_long_retain_rows_some_stand_for_the_rest_and_forget_rows_for_themselves(monkeypatch, caplog, every):
    monkeypatch.setattr(cut_rows, "COUNTED_ROWS", 10)
    monkeypatch.setattr(cut_rows, "COUNTED_EVERY", every)
    retain = [{"prompt": "good " * 30, "completion": " positive", "is_forget": False} for _ in range(50)]
    forget = [{"prompt": "film " * 30, "completion": " positive", "is_forget": True} for _ in range(7)]
    rows = Dataset.from_list([*retain, *forget])
    collator = ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length=20)
    found = list(rows_maybe_cut(collator.encoder, rows, [" neutral"]))
    assert sum(row["is_forget"] for row, _ in found) == 7
    assert sum(weight for row, weight in found if not row["is_forget"]) == 50
    assert len(found) == 10 + 40 / every + 7
    assert collator.warn_of_cut_rows(rows) == collator.encoder.num_cut == 57
    assert caplog.records[0].message.startswith("about 57 of 57" if every > 1 else "57 of 57")


def test_a_row_that_is_cut_is_warned_of_by_the_collator_once_if_nobody_did(caplog):
    row = {"prompt": "good " * 30, "completion": " positive", "is_forget": False}
    collator = ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length=20)
    collator([{**row, "prompt": "good"}])
    assert not caplog.records
    collator([row, row])
    collator([row])
    lost = len(RowEncoder(make_tokenizer(), 999).encode(row)) - 20
    assert [record.message.split(",")[0] for record in caplog.records] == [
        f"a row is longer than max_length=20 and loses {lost} tokens"
    ]
    counted = ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length=20)
    counted.warn_of_cut_rows([row])
    counted([row])
    assert len(caplog.records) == 2
