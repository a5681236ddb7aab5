"""Checks of rows and of their flags: what passes, and what each message says."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from spul.data.checks import (
    check_is_forget,
    check_row_ids,
    check_rows,
    checked_flag,
    checked_names,
    checked_texts,
    forget_flags,
    whole_number,
)

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
        (
            ROWS.to_iterable_dataset(),
            TypeError,
            "films is a stream (IterableDataset); expected a datasets.Dataset. Training takes the stream of two: "
            "spul.data.forget_retain_stream(forget, retain, forget_fraction=0.5).",
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


def test_splits_in_place_of_one_of_them_are_refused_with_their_names():
    with pytest.raises(TypeError, match=r"train_dataset is a DatasetDict of \['train'\]; expected a datasets.Dataset"):
        forget_flags(DatasetDict(train=ROWS))


def test_a_list_in_which_a_row_has_no_flag_is_refused():
    with pytest.raises(ValueError, match=r"row 1 of train_dataset has no is_forget, only \['prompt'\]"):
        forget_flags([{"is_forget": True}, {"prompt": "a"}])


FLAGS = [True, False, 1, 0, np.bool_(True), np.int64(0), torch.tensor(True), torch.tensor(1), np.array(0)]
FLAGS += [0.0, 1.0, np.float32(1), torch.tensor(1.0)]  # of a column that pandas widened
OTHERS = ["False", "True", "1", "", 2, -1, 0.5, 2.0, None, float("nan"), float("inf"), [], [True], torch.tensor([1])]


@pytest.mark.parametrize("flag", FLAGS, ids=repr)
def test_bools_and_0_and_1_are_flags_of_python_numpy_and_torch(flag):
    found = checked_flag(flag, "row 0")
    assert found is bool(int(flag))
    assert forget_flags([{"is_forget": flag}]) == [found]


@pytest.mark.parametrize("flag", OTHERS, ids=repr)
def test_any_other_flag_is_refused_with_its_row_and_value(flag):
    message = re.escape(f"row 1 of train_dataset has is_forget={flag!r}; expected True or False")
    with pytest.raises(ValueError, match=message):
        forget_flags([{"is_forget": True}, {"is_forget": flag}, {"is_forget": flag}])


@pytest.mark.parametrize("column", [[True, None], ["False", "False"], [0, 2], [0.0, 0.5]])
def test_a_column_of_other_flags_is_refused_with_its_first_row(column):
    number = next(i for i, value in enumerate(column) if value not in (False, True))
    with pytest.raises(ValueError, match=rf"row {number} of train_dataset has is_forget={column[number]!r}"):
        forget_flags(Dataset.from_dict({"is_forget": column}))


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_column_in_any_format_gives_bools(form):
    rows = Dataset.from_dict({"is_forget": [True, False]}).with_format(form)
    flags = forget_flags(rows)
    assert flags == [True, False]
    assert all(isinstance(flag, bool) for flag in flags)


def test_rows_that_share_a_row_id_are_refused_and_both_are_named():
    for rows in ([{"row_id": i} for i in (4, 7, 4)], Dataset.from_dict({"row_id": [4, 7, 4]})):
        with pytest.raises(ValueError, match=r"rows 0 and 2 of train_dataset share row_id=4; expected a different"):
            check_row_ids(rows)
    check_row_ids(Dataset.from_dict({"row_id": [7, 4]}))
    check_row_ids(ROWS)


@pytest.mark.parametrize("value", ["3", 1.5, None, True])
def test_a_row_id_that_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=rf"row 1 of train_dataset has row_id={re.escape(repr(value))}; expected a"):
        check_row_ids([{"row_id": 3}, {"row_id": value}])


def test_half_of_a_surrogate_pair_in_a_text_or_a_name_is_refused_with_its_place():
    assert checked_texts(["a", "\U0001f600", ""]) == ["a", "\U0001f600", ""]
    with pytest.raises(ValueError, match=r"^text 1 of 2 holds '\\ud83d' at character 3, which is half of a surrogate"):
        checked_texts(["a", "is \ud83d\ude00"])
    with pytest.raises(ValueError, match=r"^names has the name 'J\\udcffo', which holds '\\udcff' at character 1"):
        checked_names("names", ["Jane", "J\udcffo"])


def test_flags_as_texts_are_refused_with_their_conversion():
    texts = Dataset.from_dict({"is_forget": ["1", "False", "true", "0", " TRUE"]})
    with pytest.raises(ValueError, match="Convert the texts") as error:
        forget_flags(texts)
    code = str(error.value).split("rows.map(")[1].split(") if those")[0]
    assert forget_flags(texts.map(eval(code))) == [True, False, True, False, True]


def test_whole_numbers_that_pandas_widened_are_numbers_of_columns():
    check_row_ids(Dataset.from_dict({"row_id": [3.0, 4.0]}))
    with pytest.raises(ValueError, match="share row_id=3"):
        check_row_ids([{"row_id": 3.0}, {"row_id": 3}])
    assert whole_number(3.0, bools=False) is None  # not of settings
    assert whole_number(float(2**53 + 1), bools=False, floats=True) is None  # another number than it was
