"""Files of one's own as rows with prompt and completion: texts, conversations, or other columns through templates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..records.files import check_is_file
from .checks import check_side
from .conversations import with_whole_text
from .formats import PromptFormat
from .row_checks import check_is_row, check_texts
from .rows import read_rows, shortened
from .sources import ENCODING, read_file, said_of

MESSAGES = "messages"
TEXT_SUFFIX = ".txt"


def read_prompts(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    prompt_format: PromptFormat | None = None,
    text_field: str | None = None,
    is_forget: bool | None = None,
) -> Dataset:
    """Read files of rows in any of three forms, each row checked.

    The columns `prompt` and `completion`, both texts or both lists of messages; or `messages`, a conversation whose
    last message, the assistant's, is the completion; or, with `prompt_format`, the columns that its templates require.

    Args:
        paths: one file that `read_file` reads, or several, whose rows are joined; all of one form.
        prompt_format: templates of prompt and completion for files with other columns.
        text_field: column whose text stands in the prompt; it must be there. That of `prompt_format` unless given.
        is_forget: whether the rows are to be forgotten (True) or retained (False), which a column `is_forget` of the
            files must not contradict; None where they are neither.

    Returns:
        `prompt`, `completion` and the text field; with `prompt_format` no other columns, else all others of the files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file cannot be read, lacks the columns, a row cannot be used, or rows are of the other set;
            the message names the file and a row's number, counted from 1.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise ValueError("there are no files to read; expected at least one.")
    field = text_field or (None if prompt_format is None else prompt_format.text_field)
    parts = [_read(path, prompt_format, field, is_forget) for path in paths]
    if any(part.column_names != parts[0].column_names or part.features != parts[0].features for part in parts):
        found = "; ".join(f"{path}: {part.features}" for path, part in zip(paths, parts, strict=True))
        raise ValueError(f"the files have different columns or types: {found}. Give files of one form.")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def read_texts(path: str | os.PathLike[str], column: str = "prompt", is_forget: bool | None = None) -> list[Any]:
    """The texts of a file: the lines of a `.txt`, or a column of rows; of rows with `messages`, what is asked.

    Args:
        path: the file.
        column: the column with the texts.
        is_forget: as of `read_prompts`.

    Returns:
        Strings, or lists of messages where the column holds conversations. Blank lines are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file lacks the column, has no texts or rows of the other set, or a row has no text in it.
    """
    if os.fspath(path).endswith(TEXT_SUFFIX):
        check_is_file(path)
        with said_of(path), open(path, encoding=ENCODING, newline="\n") as lines:
            texts = [line.rstrip("\r\n") for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"{path} has no texts; expected one a line.")
        return texts
    rows = read_file(path)
    if is_forget is not None:
        check_side(rows, is_forget, os.fspath(path))
    if column == "prompt" and "prompt" not in rows.column_names and MESSAGES in rows.column_names:
        rows = _split_messages(rows, path)
    if column not in rows.column_names:
        raise ValueError(f"{path} has no column {column!r}; it has {rows.column_names}. Name the one with the texts.")
    found = [row[column] for row in read_rows(rows)]
    for number, text in enumerate(found, start=1):
        if not text or not (isinstance(text, list) or (isinstance(text, str) and text.strip())):
            raise ValueError(f"{path}, row {number}: {column} is {shortened(repr(text))}; expected a text.")
    return found


def _read(
    path: str | os.PathLike[str], prompt_format: PromptFormat | None, text_field: str | None, is_forget: bool | None
) -> Dataset:
    rows = read_file(path, as_written=prompt_format is not None)
    if is_forget is not None:
        check_side(rows, is_forget, os.fspath(path))
    if prompt_format is not None:
        made = []
        for number, row in enumerate(read_rows(rows), start=1):
            try:
                made.append(prompt_format.row(row))
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
        rows = Dataset.from_list(made)
    elif MESSAGES in rows.column_names and "prompt" not in rows.column_names:
        rows = _split_messages(rows, path)
    if missing := [name for name in ("prompt", "completion") if name not in rows.column_names]:
        raise ValueError(
            f"{path} lacks the column(s) {missing}; it has {rows.column_names}. Expected prompt and completion, or "
            "messages, or templates that make a prompt and a completion of other columns."
        )
    if text_field is not None and text_field not in rows.column_names:
        raise ValueError(
            f"{path} has no column {text_field!r}, the text field; it has {rows.column_names}. Name the column whose "
            "text stands in the prompt, or leave the text field out."
        )
    for number, row in enumerate(read_rows(rows), start=1):
        try:
            check_is_row(row)
            check_texts(row, text_field)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return rows


def _split_messages(rows: Dataset, path: str | os.PathLike[str]) -> Dataset:
    """Conversations as prompt and completion: all messages but the last, and the last, its parts as one text."""
    prompts, completions = [], []
    for number, row in enumerate(read_rows(rows), start=1):
        if not isinstance(messages := row[MESSAGES], list):
            raise ValueError(
                f"{path}, row {number}: messages is {shortened(repr(messages))}; expected at least two, in a list."
            )
        roles = [one.get("role") if isinstance(one, dict) else None for one in messages]
        if len(roles) < 2 or roles[-1] != "assistant":
            raise ValueError(
                f"{path}, row {number}: messages have the roles {roles}; expected at least two messages "
                "{'role', 'content'}, of which the assistant's, the completion, is the last."
            )
        answer = with_whole_text(messages[-1])
        if isinstance(answer.get("content"), list):
            raise ValueError(
                f"{path}, row {number}: "
                f"the answer has parts other than texts, {shortened(repr(answer))}; expected text."
            )
        prompts.append(messages[:-1])
        completions.append([answer])
    others = rows.remove_columns([MESSAGES, *({"completion"} & set(rows.column_names))])
    made = Dataset.from_dict({"prompt": prompts, "completion": completions})
    for name in others.column_names:
        made = made.add_column(name, others[name][:])
    return made
