"""Rows that `max_length` may cut, found without tokenizing every row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .encoder import RowEncoder
from .rows import ROWS_READ_AT_ONCE

# Tokens that a tokenizer may add to a text: before and after it, and for a space before it.
MORE_TOKENS = 8
# Long retain rows that are tokenized each; of those after them one in so many is.
COUNTED_ROWS, COUNTED_EVERY = 20_000, 32


def rows_maybe_cut(
    encoder: RowEncoder,
    rows: Iterable[Mapping[str, Any]],
    completions: Sequence[str] = (),
    every_forget_row: bool = False,
) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The rows that may be longer than `max_length`, each with the number of rows that it stands for.

    Rows that surely fit are left out: by the number of their characters, or else by tokenizing their prompts, some
    thousand at a time. Every long forget row stands for itself, as do the first 20,000 long retain rows; after them
    every 32nd stands for 32.

    Args:
        encoder: of the rows.
        rows: as in `RowEncoder.encode`, with or without `is_forget`.
        completions: that rows of texts must have room for as well.
        every_forget_row: whether no forget row is left out, since its completions are not known here.
    """
    rows, num_long = iter(rows), 0
    most_bytes = max((len(text.encode()) for text in completions), default=0)
    most_tokens = max((len(encoder.completion_ids(text)) for text in completions), default=0)
    while some := list(itertools.islice(rows, ROWS_READ_AT_ONCE)):
        counted: list[tuple[Mapping[str, Any], int]] = []
        for row in some:
            is_forget = bool(row.get("is_forget"))
            if not (is_forget and every_forget_row) and surely_fits(
                encoder, row, 0 if "input_ids" in row else most_bytes
            ):
                continue
            if is_forget:
                counted.append((row, 1))
                continue
            num_long += 1
            if num_long <= COUNTED_ROWS:
                counted.append((row, 1))
            elif num_long % COUNTED_EVERY == 0:
                counted.append((row, COUNTED_EVERY))
        fit = _tokens_fit(encoder, [row for row, _ in counted], most_tokens)
        for (row, stands_for), fits in zip(counted, fit, strict=True):
            if not fits or (every_forget_row and row.get("is_forget")):
                yield row, stands_for


def surely_fits(encoder: RowEncoder, row: Mapping[str, Any], num_completion: int = 0) -> bool:
    """Whether a row fits by the number of its characters, without tokenizing it.

    A token stands for one byte of text or more, but for a few that a tokenizer puts before and after.

    Args:
        encoder: of the row.
        row: as in `RowEncoder.encode`. Of conversations the template's tokens are not known, so that none surely fits.
        num_completion: take the completion to have at least this many tokens.
    """
    if "input_ids" in row:
        return len(row["input_ids"]) + num_completion <= encoder.max_length
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return False
    num_completion = max(num_completion, len(completion.encode()))
    return len(prompt.encode()) + num_completion + MORE_TOKENS <= encoder.max_length


def _tokens_fit(encoder: RowEncoder, rows: Sequence[Mapping[str, Any]], most_tokens: int) -> list[bool]:
    """Whether each row of texts fits by its tokens, the prompts tokenized together; False for all other rows."""
    fit, backend = [False] * len(rows), getattr(encoder.tokenizer, "backend_tokenizer", None)
    texts = [i for i, row in enumerate(rows) if _is_of_texts(row)]
    if backend is None or backend.truncation is not None or backend.padding is not None or not texts:
        return fit
    for i, encoding in zip(texts, backend.encode_batch_fast([rows[i]["prompt"] for i in texts]), strict=True):
        reserved = max(most_tokens, len(encoder.completion_ids(rows[i]["completion"]))) + 2  # ends
        fit[i] = len(encoding.ids) + reserved <= encoder.max_length
    return fit


def _is_of_texts(row: Mapping[str, Any]) -> bool:
    texts = (row.get("prompt"), row.get("completion"))
    return "input_ids" not in row and all(isinstance(text, str) and text for text in texts)
