"""Rows with changed prompts, texts or conversations: what attacks on the input and rewriting have in common."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ...data.checks import check_rows
from ...data.conversations import content_of, last_user_message, with_content
from ...data.encoder import RowEncoder
from ...data.rows import ADAPTER_NAME, column_values, completion_text, read_rows, rows_at, with_column

Row = dict[str, Any]


class InapplicableError(ValueError):
    """The attack cannot be made on these rows; its message, which a report repeats, shows none of them."""


class UnchangedError(InapplicableError):
    """The attack changes no prompt."""


def with_prompts_changed(rows: Dataset, change: Callable[[Dataset], Dataset], name: str) -> Dataset:
    """Apply a change to rows and check that it keeps their completions.

    Args:
        rows: `prompt`, a text or messages, and `completion`.
        change: from rows to changed rows.
        name: name of the change, for the message.

    Raises:
        TypeError: if the change makes no data set.
        ValueError: if completions change.
    """
    changed = change(rows)
    if not isinstance(changed, Dataset):
        raise TypeError(f"{name!r} makes a {type(changed).__name__} of rows; expected a datasets.Dataset.")
    if column_values(changed, "completion") != column_values(rows, "completion"):
        raise ValueError(f"{name!r} changes completions or the number of rows; only prompts may change.")
    if ADAPTER_NAME in rows.column_names and ADAPTER_NAME not in changed.column_names:
        changed = with_column(changed, ADAPTER_NAME, column_values(rows, ADAPTER_NAME))
    return changed


def changed_rows(rows: Dataset, seed: int, change: Callable[[random.Random, Row], Row]) -> Dataset:
    """Rows changed one by one, the types of their columns as before.

    Args:
        rows: `prompt`, a text or messages, and `completion`.
        seed: seed of the draws; each row has its own.
        change: from a row's draws and the row to the changed one.

    Raises:
        UnchangedError: if every prompt stays as it was.
        InapplicableError: that of `change`, with the row's number.
    """
    found = []
    for i, row in enumerate(read_rows(rows)):
        try:
            found.append(change(random.Random(f"{seed}/{i}"), dict(row)))
        except InapplicableError as error:
            raise InapplicableError(f"row {i}: {error}") from error
    changed = Dataset.from_list(found, features=rows.features)
    if column_values(changed, "prompt") == column_values(rows, "prompt"):
        raise UnchangedError("every prompt stays as it was: that is no attack.")
    return changed


def changed_prompts(
    rows: Dataset, text_field: str | None, seed: int, change: Callable[[random.Random, list[str]], list[str]]
) -> Dataset:
    """Rows with changed questions and everything else as it was.

    The question is the prompt, or the content of a conversation's last user message.

    Args:
        rows: `prompt`, a text or messages, and `completion`.
        text_field: the column whose text stands in the question and takes its changes, where it stands last; None
            takes the whole question.
        seed: seed of the draws; each row has its own.
        change: from the row's draws and the pieces of its question, before, in and after the text, to new pieces, of
            which the second is the new text.

    Raises:
        UnchangedError: if every prompt stays as it was.
        ValueError, TypeError: if the rows are invalid, or a conversation has no user message with a text.
    """
    check_prompts(rows, *([] if text_field is None else [text_field]))

    def changed(draws: random.Random, row: Row) -> Row:
        question = question_of(row["prompt"])
        if text_field is None:
            return {**row, "prompt": with_question(row["prompt"], "".join(change(draws, ["", question, ""])))}
        if not row[text_field] or row[text_field] not in question:
            message = f"the text of column {text_field!r} does not stand in the prompt"
            if isinstance(row["prompt"], str):
                raise ValueError(f"{message} of its row: {row!r}")
            raise InapplicableError(f"{message}, in its last message of the user.")
        # The last, as the encoder's: turns before the question may hold the same text.
        pieces = change(draws, list(question.rpartition(row[text_field])))
        return {**row, "prompt": with_question(row["prompt"], "".join(pieces)), text_field: pieces[1]}

    return changed_rows(rows, seed, changed)


def changed_texts(
    rows: Dataset, text_field: str | None, seed: int, change: Callable[[random.Random, str], str]
) -> Dataset:
    """Rows with the text of the field changed, or the whole question without one; otherwise as `changed_prompts`."""

    def changed(draws: random.Random, pieces: list[str]) -> list[str]:
        before, text, after = pieces
        return [before, change(draws, text), after]

    return changed_prompts(rows, text_field, seed, changed)


def question_of(prompt: Any) -> str:
    """The question of a prompt: a text itself, or the text of a conversation's last user message.

    Raises:
        InapplicableError: if a conversation has no user message, or the last one has no text.
    """
    text = _asked(prompt)
    if not isinstance(prompt, str) and not text.strip():
        raise InapplicableError(
            'a conversation has no message of the role "user", or its last one has no text, where its question would '
            f"stand; its roles are {[one['role'] for one in prompt]}. Leave such rows out."
        )
    return text


def _asked(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    last = last_user_message(prompt)
    return "" if last is None else content_of(prompt[last]) or ""


def with_questions(rows: Dataset, text_field: str | None) -> Dataset:
    """The rows that attacks can change: conversations with a question in which the text stands; all if none is one.

    Args:
        rows: `prompt`, a text or messages.
        text_field: as in `changed_prompts`.
    """
    if not is_conversation(rows):
        return rows
    texts = None
    if text_field is not None and text_field in rows.column_names:
        texts = column_values(rows, text_field)
    asked = list(map(_asked, column_values(rows, "prompt")))
    kept = [i for i, text in enumerate(asked) if text.strip() and (texts is None or (texts[i] and texts[i] in text))]
    return rows.select(kept) if 0 < len(kept) < len(rows) else rows


def with_question(prompt: Any, text: str) -> Any:
    """A prompt with another question, where `question_of` finds it."""
    if isinstance(prompt, str):
        return text
    last = last_user_message(prompt)
    return [with_content(message, text) if i == last else message for i, message in enumerate(prompt)]


def after_turns(prompt: Any, turns: Sequence[Row]) -> Any:
    """A prompt behind other questions with their answers: blank lines between texts, messages after the system's.

    Args:
        prompt: a text or messages.
        turns: rows of the same kind of prompt.
    """
    if isinstance(prompt, str):
        return "\n\n".join([*(row["prompt"] + completion_text(row["completion"]) for row in turns), prompt])
    start = num_system_messages(prompt)
    others: list[Row] = []
    for row in turns:
        answer = row["completion"]
        others += row["prompt"][num_system_messages(row["prompt"]) :]
        others += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    # A column of messages has one set of fields, and one form of content: a text, or parts.
    fields, has_parts = dict.fromkeys(prompt[0]), any(isinstance(one.get("content"), list) for one in prompt)
    others = [{**fields, **{name: value for name, value in one.items() if name in fields}} for one in others]
    for one in others:
        if isinstance(one["content"], list) != has_parts:
            text = content_of(one) or ""
            one["content"] = [{"type": "text", "text": text}] if has_parts else text
    return [*prompt[:start], *others, *prompt[start:]]


def num_system_messages(prompt: Sequence[Row]) -> int:
    """Number of messages before the first of another role than `system` and `developer`."""
    return next((i for i, one in enumerate(prompt) if one["role"] not in ("system", "developer")), len(prompt))


def check_text(text: str) -> None:
    """Raise if a text to add is empty."""
    if not text.strip():
        raise ValueError(f"text={text!r} is empty; expected a text to add, such as JAILBREAKS[0].")


def check_prompts(rows: Dataset, *more_columns: str) -> None:
    """Raise if rows have neither texts nor conversations as prompts, or lack a completion or another column."""
    check_rows(rows, ("prompt", "completion", *more_columns))
    prompt = _first_prompt(rows)
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(one, dict) for one in prompt)):
        raise TypeError(f"prompts are of the type {type(prompt).__name__}; expected texts, or lists of messages.")


def is_conversation(rows: Dataset) -> bool:
    """Whether prompts are messages and no texts; a column has one kind of them."""
    return len(rows) > 0 and not isinstance(_first_prompt(rows), str)


def _first_prompt(rows: Dataset) -> Any:
    return rows_at(rows, [0])[0]["prompt"]


def check_one_kind(rows: Dataset, other_rows: Dataset, name: str) -> None:
    """Raise if the prompts of two sets are not all texts, or all conversations.

    Args:
        rows: one set.
        other_rows: another.
        name: its name, for the message.
    """
    if is_conversation(rows) != is_conversation(other_rows):
        kinds = [type(_first_prompt(some)).__name__ for some in (rows, other_rows)]
        raise InapplicableError(
            f"prompts of the rows are of the type {kinds[0]}, those of {name} {kinds[1]}; expected texts in both, or "
            "messages."
        )


def check_has_format(rows: Dataset, text_field: str | None) -> None:
    """Raise if prompts are texts of which nobody says where the question stands among the format's parts."""
    if text_field is None and not is_conversation(rows):
        raise InapplicableError(
            "prompts are texts, and text_field=None: name the column whose text the attack is to stand around. Only "
            "conversations show by themselves what is asked."
        )


def tokens_lost(rows: Dataset, encoder: RowEncoder) -> float:
    """Number of prompt tokens that an encoder's `max_length` cuts, the mean over rows."""
    whole = encoder.with_max_length(sys.maxsize)
    lost = [len(whole.encode(row)) - len(encoder.encode(row)) for row in read_rows(rows)]
    return sum(lost) / len(lost)


def question_lost(rows: Dataset, changed: Dataset, lost: float, encoder: RowEncoder) -> str:
    """Why changed rows no longer hold their question: most of the text is cut to make room for the change.

    Conversations are cut from their start: they lose their question to what stands behind it.

    Args:
        rows: before the change.
        changed: after it.
        lost: additional tokens that the changed rows lose, the mean over rows by `tokens_lost`.
        encoder: its `max_length` and `text_field` count.

    Returns:
        The reason; empty if at least half of the text remains, and for texts without a text field.
    """
    field = encoder.text_field
    if lost <= 0:
        return ""
    if is_conversation(rows):
        pairs = zip(read_rows(rows), read_rows(changed), strict=True)
        num = sum(_is_question_lost(row, new, encoder) > _is_question_lost(row, row, encoder) for row, new in pairs)
        if num <= len(rows) / 2:
            return ""
        return (
            f"{num} of {len(rows)} conversations would lose most of their question, with {lost:.1f} tokens each; the "
            f"collator has max_length={encoder.max_length}: raise it, if the model has room for more"
        )
    if field is None:
        return ""
    texts = encoder.tokenizer(column_values(rows, field), add_special_tokens=False)["input_ids"]
    size = sum(map(len, texts)) / len(texts)
    if lost <= size / 2:
        return ""
    return (
        f"rows would lose {lost:.1f} tokens each, of {size:.1f} that their text has; the collator has max_length="
        f"{encoder.max_length}: raise it, if the model has room for more"
    )


def _is_question_lost(row: Mapping[str, Any], changed: Mapping[str, Any], encoder: RowEncoder) -> bool:
    """Whether less than half of a conversation's question is among the tokens that are kept of it after a change."""
    message = _asked(changed["prompt"])
    field = encoder.text_field
    question = changed[field] if field is not None and field in row else _asked(row["prompt"])
    # A question that is changed itself is taken to stand at the end.
    start = message.rfind(question) if question in message else max(len(message) - len(question), 0)
    behind = encoder.tokenizer(message[start + len(question) // 2 :], add_special_tokens=False)["input_ids"]
    return len(behind) > len(encoder.encode(changed).prompt_ids)
