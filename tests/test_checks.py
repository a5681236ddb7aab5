"""Checks of rows and of their flags: what passes, and what each message says."""

from __future__ import annotations

import re

import pytest
from datasets import Dataset, DatasetDict

from spul.data.checks import check_is_forget, check_rows, forget_flags

ROWS = Dataset.from_dict({"prompt": ["a"], "text": ["b"]})


def test_rows_with_the_columns_required_pass():
    check_rows(ROWS, ("text", "prompt"))
    check_rows(ROWS, ())


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            [{"prompt": "a"}],
            TypeError,
            "films is a list; expected a datasets.Dataset: Dataset.from_list([{'prompt': ..., 'completion': ...}, "
            "...]), or one split of a DatasetDict.",
        ),
        (DatasetDict(train=ROWS), TypeError, "films is a DatasetDict; expected a datasets.Dataset: "),
        (Dataset.from_list([]), ValueError, "films is empty; expected at least one row."),
        (
            ROWS,
            ValueError,
            "films lacks the column(s) ['completion']; it has ['prompt', 'text'], expected ['prompt', 'completion']. "
            "Rename or map your columns, or name others where an argument names them.",
        ),
    ],
)
def test_other_rows_are_refused_with_what_was_found_and_what_was_expected(rows, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        check_rows(rows, name="films")


def test_a_row_or_batch_without_a_flag_is_refused_with_its_columns_and_the_trainers_option():
    check_is_forget({"is_forget": False}, "a row")
    with pytest.raises(ValueError, match=r"^a row has no is_forget, only \['a', 'b'\]\. Make the data set") as error:
        check_is_forget({"b": 1, "a": 2}, "a row")
    assert "forget_retain_dataset(forget, retain)" in str(error.value)
    assert "remove_unused_columns=False" in str(error.value)


def test_flags_are_read_from_data_sets_and_lists():
    rows = [{"is_forget": True}, {"is_forget": False}, {"is_forget": 1}]
    assert forget_flags(rows) == [True, False, True]
    flags = forget_flags(Dataset.from_dict({"is_forget": [1, 0]}))
    assert flags == [True, False]
    assert all(isinstance(flag, bool) for flag in flags)


def test_a_data_set_without_flags_is_refused_with_its_columns():
    with pytest.raises(ValueError, match=r"train_dataset has no is_forget, only \['prompt'\]"):
        forget_flags(Dataset.from_dict({"prompt": ["a"]}))


def test_a_list_in_which_a_row_has_no_flag_is_refused():
    with pytest.raises(ValueError, match=r"a row of train_dataset has no is_forget, only \['prompt'\]"):
        forget_flags([{"is_forget": True}, {"prompt": "a"}])
