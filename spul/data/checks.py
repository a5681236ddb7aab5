"""Checks of data sets and rows. Public calls make them, before any work is done.

Each message says what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from .rows import ADAPTER_NAME, check_returned, column_batches, column_values, normalized

TEXT_TYPES = ("string", "large_string")
SPLIT = "forget = rows.filter(lambda row: row['is_forget']), retain = rows.filter(lambda row: not row['is_forget'])"


def check_rows(
    rows: Any, columns: Sequence[str] = ("prompt", "completion"), name: str = "rows", argument: str | None = None
) -> None:
    """Check that rows are a data set with certain columns and at least one row.

    Args:
        rows: any object.
        columns: the columns required.
        name: the rows' name in messages, such as the argument's.
        argument: the argument that names the columns, for the message, such as `"text_field"`.

    Raises:
        TypeError: if `rows` is not a `datasets.Dataset`.
        ValueError: if a column is missing, there are no rows, or a transform of theirs leaves `adapter_name` out.
    """
    if isinstance(rows, IterableDataset):
        raise TypeError(
            f"{name} is a stream (IterableDataset); expected a datasets.Dataset. Training takes the stream of two: "
            "spul.data.forget_retain_stream(forget, retain, forget_fraction=0.5)."
        )
    if not isinstance(rows, Dataset):
        example = "".join(f"{column!r}: ..., " for column in columns).rstrip(", ") or "..."
        raise TypeError(
            f"{name} is a {type(rows).__name__}; expected a datasets.Dataset: Dataset.from_list([{{{example}}}, "
            "...]), or one split of a DatasetDict."
        )
    if len(rows) == 0:
        raise ValueError(f"{name} is empty; expected at least one row.")
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"{name} lacks the column(s) {missing}; it has {rows.column_names}, expected {list(columns)}. "
            + _remedy(rows, argument)
        )
    if ADAPTER_NAME in rows.column_names:
        check_returned(rows, ADAPTER_NAME)  # a row without it would run under the active prompt


def _remedy(rows: Dataset, argument: str | None) -> str:
    """The remedy for a missing column."""
    if argument is None and "messages" in rows.column_names:
        return (
            "Split the conversations: rows.map(lambda row: {'prompt': row['messages'][:-1], 'completion': "
            "row['messages'][-1:]}); spul.data.read_prompts(path) does it for a file."
        )
    if argument is None:
        return "Rename or map your columns, or name others where an argument names them."
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in TEXT_TYPES]
    example = (texts or rows.column_names)[0]
    return f"The argument {argument} names the column: {argument}={example!r}, if it is that one."


def check_is_forget(columns: Iterable[str], name: str) -> None:
    """Check that a data set, a row or a batch has the column `is_forget`.

    Args:
        columns: the names of its columns.
        name: its name in the message.

    Raises:
        ValueError: if `is_forget` is not among them.
    """
    columns = list(columns)
    if "is_forget" not in columns:
        raise ValueError(
            f"{name} has no is_forget, only {sorted(map(str, columns))}. Make the data set with "
            "forget_retain_dataset(forget, retain) and collate with ForgetRetainCollator; if a "
            "Trainer pruned the column, set TrainingArguments(remove_unused_columns=False)."
        )


def forget_flags(rows: Any, name: str = "train_dataset") -> list[bool]:
    """The `is_forget` flags of a data set, or of any sequence of rows.

    Raises:
        TypeError: if the rows are a mapping, as a `DatasetDict` is.
        ValueError: if the data set or a row has none, or a flag is not a bool, 0 or 1.
    """
    if isinstance(rows, Mapping):
        raise TypeError(
            f"{name} is a {type(rows).__name__} of {list(rows)}; expected a datasets.Dataset, such as one of these."
        )
    if hasattr(rows, "column_names"):
        check_is_forget(rows.column_names, name)
        values = column_values(rows, "is_forget")
        if set(map(type, values)) == {bool}:
            return values
        return [checked_flag(flag, f"row {i} of {name}") for i, flag in enumerate(values)]
    flags = []
    for i, row in enumerate(rows):
        check_is_forget(row, f"row {i} of {name}")
        flags.append(checked_flag(row["is_forget"], f"row {i} of {name}"))
    return flags


def check_side(rows: Any, is_forget: bool, name: str) -> None:
    """Check that the rows of a set, where they have the column `is_forget`, say which set they are given as.

    Args:
        rows: a data set or a stream's rows, such as those of `forget_retain_dataset`.
        is_forget: whether they are given as rows to forget.
        name: the set's name, or its file's, in the message.

    Raises:
        ValueError: if some say the opposite, or a flag is not a bool, 0 or 1.
    """
    if "is_forget" not in rows.column_names:
        return
    if other := sum(flag != is_forget for flag in forget_flags(rows, name)):
        raise ValueError(
            f"{other} row(s) of {name} have is_forget={not is_forget}; expected {is_forget} in rows that are given as "
            f"those to {'forget' if is_forget else 'retain'}, or no such column. Split one set by its column: {SPLIT}."
        )


def checked_flag(flag: Any, name: str) -> bool:
    """The flag `is_forget` of a row as a bool.

    Args:
        flag: a bool, 0 or 1, of Python, numpy or torch; 0.0 and 1.0, as pandas makes of a column, too.
        name: the row's name in the message.

    Raises:
        ValueError: if it is anything else: the text "False", a missing value, 2.
    """
    number = whole_number(flag, bools=True, floats=True)
    if number not in (0, 1):
        remedy = "Convert the column"
        if isinstance(flag, str):  # of which each is true to Python, "0" and "False" among them
            remedy = (
                "Convert the texts, rows.map(lambda row: {'is_forget': row['is_forget'].strip().lower() in "
                "('1', 'true')}) if those two mean True"
            )
        raise ValueError(
            f"{name} has is_forget={flag!r}; expected True or False, or 1 or 0. {remedy}, or drop the column: "
            "forget_retain_dataset(forget, retain) makes it."
        )
    return bool(number)


def check_row_ids(rows: Any) -> None:
    """Check that training rows, a data set or any sequence of rows, have different whole numbers as `row_id`.

    A data set without the column passes.

    Raises:
        ValueError: if two rows share one, or one is not a whole number.
    """
    if hasattr(rows, "column_names"):
        values = column_values(rows, "row_id") if "row_id" in rows.column_names else []
    else:
        values = [row["row_id"] for row in rows if "row_id" in row]
    if set(map(type, values)) == {int} and len(set(values)) == len(values) and _is_int64(min(values), max(values)):
        return
    first: dict[int, int] = {}
    for i, value in enumerate(values):
        number = checked_row_id(value, f"row {i} of train_dataset")
        if first.setdefault(number, i) != i:
            raise ValueError(
                f"rows {first[number]} and {i} of train_dataset share row_id={number}; expected a different whole "
                "number for each row. Join data sets with forget_retain_dataset(forget, retain), which numbers them "
                "anew."
            )


def checked_row_id(value: Any, name: str) -> int:
    """The `row_id` of a row as an int.

    Raises:
        ValueError: if it is not a whole number.
    """
    number = whole_number(value, bools=False, floats=True)
    if number is None or not _is_int64(number):
        raise ValueError(
            f"{name} has row_id={value!r}; expected a whole number of 64 bits, such as "
            "forget_retain_dataset(forget, retain) gives each row."
        )
    return number


def _is_int64(*numbers: int) -> bool:
    return all(-(2**63) <= number < 2**63 for number in numbers)


def whole_number(value: Any, bools: bool, floats: bool = False) -> int | None:
    """Whole number of Python, numpy or torch as an int, bools among them where allowed; None for all else.

    Args:
        value: any object.
        bools: whether True and False count, as 1 and 0.
        floats: whether 3.0 does, as of a column that pandas widened.
    """
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        return int(value) if bools else None
    if floats and isinstance(value, (float, np.floating)):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else None  # beyond, digits were lost
    return int(value) if isinstance(value, (int, np.integer)) else None


def check_not_generic(completions: Iterable[str], generic_completions: Sequence[str] | None) -> None:
    """Check that no completion of the data is a generic one, which would be trained and forbidden at once.

    Raises:
        ValueError: if one is, letter case and outer white space aside.
    """
    generic = {normalized(text) for text in generic_completions or ()}
    if both := sorted(text for text in completions if normalized(text) in generic):
        raise ValueError(
            f"the completion {both[0]!r} of a row is one of generic_completions={generic_completions!r}: a forget row "
            "would be trained to its own label. Choose generic completions that no row has as its label."
        )


def checked_generic_completions(texts: Any) -> list[str]:
    """The completions that forget rows draw from, as a list.

    Raises:
        TypeError: if they are one string, come in no order, or are not all texts.
        ValueError: if there are none, some are empty or alike, or one holds half of a surrogate pair.
    """
    if isinstance(texts, str):
        raise TypeError(f"generic_completions={texts!r} is one string; pass a list of completions.")
    if not isinstance(texts, Iterable) or isinstance(texts, (Mapping, Set)):  # by whose order draws resume
        raise TypeError(f"generic_completions={texts!r} is a {type(texts).__name__}; pass a list of completions.")
    texts = list(texts)
    if other := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(
            f"generic_completions={texts!r} holds {other[0]!r}; expected texts; "
            "in a conversation a text becomes the content of the answer."
        )
    for text in texts:
        if fault := fault_of_text(text):
            raise ValueError(f"generic_completions holds {text!r:.80}, which {fault}")
    different = {normalized(text) for text in texts}
    if not texts or "" in different or len(different) < len(texts):
        raise ValueError(
            f"generic_completions={texts!r}: expected one or more different, non-empty texts, or None to keep each "
            "forget row's own completion."
        )
    return texts


def checked_strings(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: if they are a single string, or not all are strings.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts is one string, {texts[:80]!r}; expected a list of strings.")
    texts = list(texts)
    if bad := [(i, text) for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise _not_texts(bad, len(texts))
    return texts


def checked_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list; all of their characters can be written and tokenized.

    Raises:
        TypeError: if they are a single string, or not all are strings.
        ValueError: if one holds half of a surrogate pair.
    """
    texts = checked_strings(texts)
    for i, text in enumerate(texts):
        if fault := fault_of_text(text):
            raise ValueError(f"text {i} of {len(texts)} {fault}")
    return texts


def fault_of_text(text: str) -> str | None:
    """The fault of a text that no file and no tokenizer takes, to be said of its name; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"holds {text[error.start : error.start + 1]!r} at character {error.start}, which is half of a surrogate "
            "pair and no character; drop it, or read the file in its own encoding."
        )
    return None


def checked_column(rows: Any, column: str, name: str = "rows") -> list[str]:
    """The texts of the column that `text_field` names, checked by `check_rows` and `checked_texts`."""
    check_rows(rows, (column,), name, argument="text_field")
    return checked_texts(column_values(rows, column))


def checked_text_batches(rows: Any, column: str) -> Iterator[list[str]]:
    """The texts of a column of checked rows, some thousand at a time, themselves checked as in `checked_texts`."""
    bad: list[tuple[int, Any]] = []
    num = 0
    for texts in column_batches(rows, column):
        bad += [(num + i, text) for i, text in enumerate(texts) if not isinstance(text, str)]
        num += len(texts)
        if not bad:
            yield texts
    if bad:
        raise _not_texts(bad, num)


def _not_texts(bad: Sequence[tuple[int, Any]], num: int) -> TypeError:
    remedy = "Fill or drop them; of a data set pass a column: rows['prompt'][:]."
    if isinstance(bad[0][1], list):
        remedy = (
            "Conversations are no texts. For a gate, pass spul.gates.prompt_texts(rows, collator.encoder); to look "
            "for names, pass a column of texts, made by rows.map(lambda row: {'text': ...})."
        )
    return TypeError(
        f"{len(bad)} of {num} texts are not strings; the first is text {bad[0][0]}: {bad[0][1]!r:.80}. {remedy}"
    )


def checked_list(argument: str, values: Any) -> list[Any]:
    """The different values of an argument, in their order.

    Raises:
        TypeError: if they are one string, or not iterable.
        ValueError: if there are none.
    """
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{argument} is {values!r}; expected a list: [{values!r}].")
    different: list[Any] = []
    seen: set[Any] = set()
    for value in values:
        try:
            is_new = value not in seen
            seen.add(value)
        except TypeError:  # a list or a dict, which no set holds
            is_new = value not in different
        if is_new:
            different.append(value)
    if not different:
        raise ValueError(f"{argument} is empty; expected at least one.")
    return different


def checked_names(argument: str, names: Any) -> list[str]:
    """The different names of an argument.

    Raises:
        TypeError: if they are one string, or not iterable.
        ValueError: if there are none, or one is empty, not a string, or holds half of a surrogate pair.
    """
    different = checked_list(argument, names)
    if bad := [name for name in different if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"{argument} holds {bad[0]!r}; expected names as text.")
    for name in different:
        if fault := fault_of_text(name):
            raise ValueError(f"{argument} has the name {name!r}, which {fault}")
    return different
