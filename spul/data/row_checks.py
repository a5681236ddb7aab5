"""Checks of one row: the types of its columns, before a tokenizer or a chat template meets them."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .checks import checked_flag, fault_of_text, whole_number
from .rows import completion_text, is_empty, normalized, read_rows, shortened

if TYPE_CHECKING:
    from .encoder import RowEncoder

# Rows that are tokenized where a tokenizer has more tokens than the base has embeddings, as for images in texts.
LOOKED_AT = 1_000
NO_ANSWER = ("system", "user", "tool")  # roles that answer nothing
# Columns that TRL gives a chat template beside the messages.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
RESIZE = "call model.resize_token_embeddings(len(tokenizer)) before a prompt or an adapter is put on the model"
REMEDY = "If a Trainer pruned them, set TrainingArguments(remove_unused_columns=False)."


def row_name(row: Mapping[str, Any], number: int | None = None) -> str:
    """The name of a row in messages: by its `row_id`, or else its number in the batch.

    Args:
        row: the row.
        number: its number in the batch, if known.
    """
    if "row_id" in row:
        return f"the row with row_id={shortened(repr(row['row_id']), 40)}"
    return "a row" if number is None else f"row {number} of the batch"


def row_flag(row: Mapping[str, Any], number: int | None = None) -> bool:
    """The checked `is_forget` of a row, which `row_name` names."""
    return checked_flag(row["is_forget"], row_name(row, number))


def check_is_row(row: Any, number: int | None = None) -> None:
    """Check that a row is a mapping of columns.

    Args:
        row: any object.
        number: its number in the batch, if known.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(row, Mapping):
        name = "a row" if number is None else f"row {number} of the batch"
        raise TypeError(f"{name} is a {type(row).__name__}; expected a mapping of columns: {{'prompt': ..., ...}}.")


def check_token_ids(encoder: RowEncoder, rows: Iterable[Mapping[str, Any]], num_embeddings: int | None) -> None:
    """Check that a base has an embedding for each token of the first rows; on a GPU one without stops the process.

    Args:
        encoder: of the rows.
        rows: as in `RowEncoder.encode`.
        num_embeddings: number of the base's input embeddings; None, if unknown, checks nothing.

    Raises:
        ValueError: if it has not.
    """
    if num_embeddings is None or len(encoder.tokenizer) <= num_embeddings:
        return
    for row in itertools.islice(read_rows(rows), LOOKED_AT):
        encoded = encoder.encode(row)
        largest = max(encoded.prompt_ids + encoded.completion_ids)
        if largest >= num_embeddings:
            raise ValueError(
                f"the tokenizer gives {row_name(row)} the token id {largest}, and the base has {num_embeddings} input "
                f"embeddings; expected the base's own tokenizer. If tokens were added to it, {RESIZE}."
            )


def check_all_texts(encoder: RowEncoder, rows: Iterable[Mapping[str, Any]]) -> None:
    """Check all rows that are not tokenized by `check_texts`, and encode those that it cannot judge.

    Their prompts are blank, which some tokenizers give a token, or their text fields are blank or not in the prompt.

    Args:
        encoder: of the rows.
        rows: as in `RowEncoder.encode`.

    Raises:
        ValueError: if one cannot be encoded.
    """
    field = encoder.text_field or "prompt"
    for row in read_rows(rows, ("input_ids", "prompt", "completion", "row_id", field)):
        if "input_ids" in row:
            continue
        check_texts(row, encoder.text_field)
        prompt = row["prompt"]
        if isinstance(prompt, str) and not (row[field].strip() and row[field] in prompt and prompt.strip()):
            encoder.encode(row)


def check_can_be_scored(
    encoder: RowEncoder, name: str, rows: Iterable[Mapping[str, Any]], num_embeddings: int | None
) -> None:
    """Check that all rows of a set can be encoded, and that a base embeds the tokens of the first ones.

    Args:
        encoder: of the rows.
        name: of the set, in messages.
        rows: as in `RowEncoder.encode`.
        num_embeddings: number of the base's input embeddings; None if unknown.

    Raises:
        ValueError: if a row cannot be used, or a token has no embedding.
    """
    try:
        check_all_texts(encoder, rows)
        check_token_ids(encoder, rows, num_embeddings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_texts(row: Mapping[str, Any], text_field: str | None = None) -> None:
    """Check the prompt and the completion of a row: both texts, or both lists of messages, and not empty.

    A conversation with a column that its chat template would not get is refused: it would be rendered otherwise than
    where it is served.

    Args:
        row: a row that is not tokenized.
        text_field: the column whose text may be cut, which a text prompt must have.

    Raises:
        ValueError: if one is missing, empty, of another type, or no valid Unicode.
    """
    if "prompt" not in row or "completion" not in row:
        raise ValueError(
            f"{row_name(row)} has the columns {_columns(row)}; expected prompt and completion, or input_ids and "
            f"completion_mask. {REMEDY}"
        )
    prompt, completion = row["prompt"], row["completion"]
    if completion is None or (isinstance(completion, (str, list)) and not completion):
        raise ValueError(f"{row_name(row)} has an empty completion: {_shown(row)}. Drop it, or fill it in.")
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = {"prompt": prompt, "completion": completion}
        if text_field is not None:
            if text_field not in row:
                raise ValueError(f"text_field={text_field!r}, but a row has only the columns {_columns(row)}.")
            texts[text_field] = row[text_field]
        for column, text in texts.items():
            _check_text(row, column, text)
    else:
        # Of a text beside something else, that is at fault: a label that is a number, say.
        for column in sorted(("prompt", "completion"), key=lambda name: isinstance(row[name], str)):
            _check_messages(row, column)
        _check_template_columns(row)
    if is_empty(completion):
        raise ValueError(f"{row_name(row)} has an empty completion: {_shown(row)}. Drop it, or fill it in.")


def _check_template_columns(row: Mapping[str, Any]) -> None:
    """Raise if a conversation has a value in one of `TEMPLATE_COLUMNS`; a column of others fills in None."""
    for column in TEMPLATE_COLUMNS:
        value = row.get(column)
        parts = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(parts, (list, str)) and any(part is not None for part in parts):
            raise ValueError(
                f"{row_name(row)} is a conversation with the column {column!r}, {shortened(repr(value))}, which the "
                "chat template does not get. Drop the column, rows.remove_columns(...), and set what all rows are "
                "rendered with in the template itself: tokenizer.chat_template = '{% set enable_thinking = false %}' "
                "+ tokenizer.chat_template."
            )


def split_tokenized(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The token ids of a tokenized row's prompt, and those of its completion.

    Args:
        row: `input_ids` and `completion_mask`.

    Raises:
        ValueError: if they are not lists of one length, of token ids, and of 0 for the prompt, then 1.
    """
    if row.get("completion_mask") is None:
        raise ValueError(
            f"{row_name(row)}, a tokenized one, has the columns {_columns(row)}; expected input_ids and a "
            f"completion_mask of the same length (0 for prompt tokens, 1 for completion tokens). {REMEDY}"
        )
    ids, mask = token_ids(row, "input_ids", row["input_ids"]), _as_list(row["completion_mask"])
    if mask is None or any(type(value) not in (bool, int) or value not in (0, 1) for value in mask):
        raise ValueError(
            f"{row_name(row)}: completion_mask is {_short(row['completion_mask'])}; expected a list of 0 for prompt "
            "tokens, then 1 for completion tokens."
        )
    if len(mask) != len(ids):
        raise ValueError(
            f"{row_name(row)} has {len(ids)} input_ids and {len(mask)} values of completion_mask; expected a "
            f"completion_mask of the same length. {REMEDY}"
        )
    num_prompt = mask.index(1) if 1 in mask else len(ids)
    if not all(mask[num_prompt:]):
        raise ValueError(
            f"{row_name(row)}: completion_mask must be 0 for the prompt, then 1 for the completion; got "
            f"{_short(mask)}."
        )
    return ids[:num_prompt], ids[num_prompt:]


def token_ids(row: Mapping[str, Any], column: str, values: Any) -> list[int]:
    """Token ids of a row's column, checked: whole numbers of at least 0 that fit 64 bits.

    Raises:
        ValueError: if they are not.
    """
    listed = _as_list(values)
    try:
        ids = array("q", listed or []).tolist()
    except (TypeError, OverflowError):
        listed = None
    if listed is None or min(ids, default=0) < 0:
        raise ValueError(f"{row_name(row)}: {column} is {_short(values)}; expected a list of token ids.")
    return ids


def ending_of(row: Mapping[str, Any], num_completion: int) -> int:
    """The checked `num_ending` of a tokenized row: how many of its last tokens a chat template put after the answer.

    Raises:
        ValueError: if it is not a whole number of at most `num_completion`.
    """
    value = row.get("num_ending")
    if value is None:
        return 0
    number = whole_number(value, bools=False, floats=True)
    if number is None or not 0 <= number <= num_completion:
        raise ValueError(
            f"{row_name(row)}: num_ending is {_short(value)}; expected a whole number from 0 to {num_completion}, the "
            "completion's tokens, as ForgetRetainCollator.tokenize writes it."
        )
    return number


def check_ends_alike(row: Mapping[str, Any], append_eos: bool) -> None:
    """Check that the completion of a tokenized row ends as a generic one does that is encoded in its place.

    Raises:
        ValueError: if it was tokenized by a collator with another `append_eos`, or from a conversation without
            `generic_completions`.
    """
    found = row.get("num_ending")
    if "input_ids" in row and found is not None and found != int(append_eos):
        raise ValueError(
            f"{row_name(row)}, a tokenized one, has {_short(found)} token(s) after its answer (num_ending), and a "
            f"generic completion in its place would have {int(append_eos)} (append_eos={append_eos}). Tokenize the "
            "data set anew with this collator."
        )


def position_of(row: Mapping[str, Any], num_prompt: int) -> int:
    """The checked `prompt_position` of a tokenized row: how many of its tokens stand before a soft prompt.

    Raises:
        ValueError: if it is missing, or not a whole number of at most `num_prompt`.
    """
    value = row.get("prompt_position")
    number = whole_number(value, bools=False, floats=True)
    if number is None or not 0 <= number <= num_prompt:
        raise ValueError(
            f"{row_name(row)}, a tokenized one: prompt_position is {_short(value)}; expected a whole number from 0 to "
            f"{num_prompt}, the prompt's tokens, by which a soft prompt stands before the message. Tokenize the data "
            'set anew by a collator with prompt_position="message".'
        )
    return number


def generic_ids_of(row: Mapping[str, Any], num: int) -> list[list[int]] | None:
    """The checked `generic_ids` of a tokenized row: token ids of the collator's generic completions; None without.

    Raises:
        ValueError: if they are not `num` lists of token ids.
    """
    values = row.get("generic_ids")
    if values is None:
        return None
    listed = _as_list(values)
    if listed is None or len(listed) != num:
        raise ValueError(
            f"{row_name(row)}: generic_ids is {_short(values)}; expected {num} lists of token ids, one for each of "
            "the collator's generic_completions. Tokenize the data set anew with this collator."
        )
    found = [token_ids(row, f"generic_ids[{i}]", one) for i, one in enumerate(listed)]
    if [] in found:
        raise ValueError(f"{row_name(row)}: generic_ids[{found.index([])}] is empty; expected at least one token id.")
    return found


def alternates_of(row: Mapping[str, Any], column: str) -> list[str | list[int]]:
    """The checked alternatives of a forget row, in place of its own completion: texts, or lists of token ids.

    Raises:
        ValueError: if the row has none, one is empty, or one is the row's own completion.
    """
    values = _as_list(row.get(column))
    if not values:
        raise ValueError(
            f"{row_name(row)}: {column} is {_short(row.get(column))}; expected a list of one or more texts for each "
            "forget row, the completions to draw from in place of its own, as spul.training.add_alternates writes."
        )
    if not all(isinstance(one, str) for one in values):
        found: list[str | list[int]] = [token_ids(row, f"{column}[{i}]", one) for i, one in enumerate(values)]
        if [] in found:
            raise ValueError(f"{row_name(row)}: {column}[{found.index([])}] is empty; expected at least one token id.")
        return found
    own = normalized(completion_text(row["completion"])) if "completion" in row else None
    for i, text in enumerate(values):
        _check_text(row, f"{column}[{i}]", text)
        if normalized(text) in ("", own):
            raise ValueError(
                f"{row_name(row)}: {column}[{i}] is {_short(text)}, empty or the row's own completion; expected "
                "another answer."
            )
    return values


def _as_list(values: Any) -> list[Any] | None:
    """A list, tuple, array or tensor as a list; None for anything else."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values) if isinstance(values, Sequence) and not isinstance(values, (str, bytes)) else None


def _check_text(row: Mapping[str, Any], column: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{row_name(row)}: {column} is {_short(text)}, a {type(text).__name__}; expected text.")
    if fault := fault_of_text(text):
        raise ValueError(f"{row_name(row)}: {column} {fault}")


def _check_messages(row: Mapping[str, Any], column: str) -> None:
    """Check a conversation; the last message of a completion is the answer, and has text."""
    messages = row[column]
    is_list = isinstance(messages, list) and messages
    if not is_list or any(not isinstance(one, Mapping) or not isinstance(one.get("role"), str) for one in messages):
        raise ValueError(
            f"{row_name(row)}: {column} is {_short(messages)}; expected prompt and completion to be texts, or both "
            "lists of {'role', 'content'} messages."
        )
    for one in messages:
        parts = one.get("content")
        for part in (one, *(parts if isinstance(parts, list) else ())):
            for key, value in part.items() if isinstance(part, Mapping) else ():
                if isinstance(value, str):
                    _check_text(row, f"{key} of a message of {column}", value)
    if column == "completion" and (other := [one["role"] for one in messages if one["role"] in NO_ANSWER]):
        raise ValueError(
            f"{row_name(row)}: completion has a message of the role {other[0]!r}, which would be trained and scored "
            "as an answer; expected the answer alone, of the role 'assistant'. Put messages before it into prompt, "
            "and leave out those after it."
        )
    if column == "completion" and not isinstance(messages[-1].get("content"), (str, type(None))):
        _check_text(row, "content of the last message of completion", messages[-1]["content"])


def _columns(row: Mapping[str, Any]) -> list[str]:
    return sorted(map(str, row))


def _short(value: Any) -> str:
    return shortened(repr(value), 80)


def _shown(row: Mapping[str, Any]) -> str:
    return shortened(repr(dict(row)))
