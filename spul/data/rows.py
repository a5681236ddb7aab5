"""Rows read column by column, a row's completion as text, and how texts are compared and shown in messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..records.digests import is_transformed, plain_rows

# Rows or texts that a message or a report shows as examples.
SHOWN = 3
# Column that names the prompt of each row, `"__base__"` for none, where a model has several.
ADAPTER_NAME = "adapter_name"
# Column that names the way by which a training row was rewritten; None for the rows that were given.
REWRITTEN_BY = "rewritten_by"
# Rows that are read at once: a single one costs as much as a hundred, and all of them take memory.
ROWS_READ_AT_ONCE = 4096


def column_batches(rows: Any, column: str) -> Iterator[list[Any]]:
    """The values of a data set's column, some thousand at a time."""
    rows = plain_rows(rows)
    for start in range(0, len(rows), ROWS_READ_AT_ONCE):
        try:
            values = list(rows[column][start : start + ROWS_READ_AT_ONCE])
        except KeyError:
            check_returned(rows, column)
            raise
        yield values


def check_returned(rows: Dataset, column: str) -> None:
    """Check that a transform of the rows, where they have one, does not leave out a column.

    Raises:
        ValueError: if it does.
    """
    if is_transformed(rows) and column not in (made := list(rows[:1])):
        raise ValueError(
            f"the rows have a transform (with_transform or set_transform), which returns the columns {made}; "
            f"expected {column!r} among them. Let it return all columns that it gets, changed or not."
        )


def with_column(rows: Dataset, name: str, values: Sequence[Any] | np.ndarray) -> Dataset:
    """Rows with a column of these values, in place of the one that they may have.

    Raises:
        ValueError: if the rows have a transform that leaves it out.
    """
    if name in rows.column_names:
        rows = rows.remove_columns(name)
    rows = rows.add_column(name, values)
    check_returned(rows, name)
    return rows


def column_values(rows: Any, column: str) -> list[Any]:
    """All values of a data set's column."""
    return [value for values in column_batches(rows, column) for value in values]


def read_rows(rows: Any, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set in their order, read some thousand at a time; those of another sequence as they are.

    Args:
        rows: a `datasets.Dataset`, or any sequence of rows.
        columns: the columns to read, of those that there are; None for all.
    """
    if not hasattr(rows, "select_columns"):
        yield from rows
        return
    rows = _with_columns(plain_rows(rows), columns)
    for start in range(0, len(rows), ROWS_READ_AT_ONCE):
        yield from _as_rows(rows[start : start + ROWS_READ_AT_ONCE])


def rows_at(rows: Any, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    """Some rows of a data set or of another sequence, read together where that is possible.

    Args:
        rows: as of `read_rows`.
        indices: which.
        columns: as of `read_rows`.
    """
    if not hasattr(rows, "select_columns") or not indices:
        return [rows[index] for index in indices]
    return list(_as_rows(_with_columns(plain_rows(rows), columns)[indices]))


def _with_columns(rows: Any, columns: Sequence[str] | None) -> Any:
    """A data set with some of its columns; with all where None is given, or a transform may read them."""
    if columns is None or is_transformed(rows):
        return rows
    return rows.select_columns([name for name in columns if name in rows.column_names])


def _as_rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def concatenated(parts: Sequence[Dataset]) -> Dataset:
    """Data sets as one; where they are formatted in different ways, without any format.

    Raises:
        ValueError: if some have a transform, and others another one, none or other columns: it would be lost as well.
    """
    if any(map(is_transformed, parts)) and any(part.format != parts[0].format for part in parts):
        raise ValueError(
            "some of the rows to be joined have a transform (with_transform or set_transform), and others another "
            "one, none or other columns, so that it would be lost. Apply it before, "
            "rows.with_format(None).map(transform, batched=True), or set it on the joined rows."
        )
    return concatenate_datasets(list(parts))


def adapter_names_of(rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The names in the column `adapter_name`; None if the rows have none."""
    return [row[ADAPTER_NAME] for row in rows] if rows and ADAPTER_NAME in rows[0] else None


def rewritten_by(rows: Any) -> list[str | None]:
    """Of each row, the way by which it was rewritten; None for one that was given as it is."""
    if not hasattr(rows, "column_names"):
        return [row.get(REWRITTEN_BY) for row in rows]
    return column_values(rows, REWRITTEN_BY) if REWRITTEN_BY in rows.column_names else [None] * len(rows)


def completion_text(completion: Any) -> str:
    """A completion as text: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def normalized(completion: str) -> str:
    """A completion for comparison with others: letter case and outer white space do not count."""
    return completion.strip().casefold()


def is_empty(completion: Any) -> bool:
    """Whether a completion, text or messages, has no content."""
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or not str(completion[-1].get("content") or "").strip()


def prompt_of(row: Mapping[str, Any]) -> Any:
    """The prompt of a row as text or messages, or as token ids if the row is only tokenized."""
    if "prompt" in row:
        return row["prompt"]
    return [
        token
        for token, is_completion in zip(row["input_ids"], row["completion_mask"], strict=True)
        if not is_completion
    ]


def shortened(text: str, width: int = 160) -> str:
    """A text of at most `width` characters, with an ellipsis where it was cut."""
    return text if len(text) <= width else text[: width - 3] + "..."
