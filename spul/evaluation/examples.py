"""Examples of the attacks on the input, each on a row made up for it: reports show no rows of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..data.conversations import content_of, texts_of
from ..data.rows import column_values
from .aggregation import in_words
from .attacks.changes import InapplicableError, is_conversation, with_prompts_changed
from .attacks.usual import STAND_IN, TURN_UNIT, checked_attacks
from .suite import Suite

OTHERS = tuple(f"Play number {i} has a fine cast and a poor script." for i in range(1, 65))


def attack_examples(suite: Suite) -> dict[str, str]:
    """A made-up row, a text or a conversation as those of the evaluation, as each attack on the input changes it.

    Attacks that are the user's own may put other rows into a prompt. An example with a prompt or a text of the
    evaluation's rows in it is left out, and so is one of an attack that cannot be made on the row; `suite.skipped`
    says so.

    Args:
        suite: models, rows and settings.

    Returns:
        The changed prompt by the attack's name in the report; of a conversation a line for each message, its role
        first.
    """
    settings, text_field = suite.attacks, suite.collator.encoder.text_field
    as_messages = is_conversation(suite.splits["test_forget"])
    row = _rows([STAND_IN], text_field, as_messages, " ".join(settings.wording or ()))
    attacks = settings.inputs
    if attacks is None:
        others = _rows(OTHERS, text_field, as_messages)
        attacks = settings.usual_attacks(text_field, others, others, suite.seed)
    found = {}
    for (attack, level), change in checked_attacks(attacks).items():
        name = in_words(attack, level, TURN_UNIT)
        try:
            text = _in_lines(with_prompts_changed(row, change, name)[0]["prompt"])
        except InapplicableError:
            continue
        except Exception as error:
            if settings.inputs is None:
                raise
            suite.skipped[f"example of the input attack {name!r}"] = f"it fails on a made-up row: {error!r}"
            continue
        if settings.inputs is not None and _holds_rows(text, suite):
            suite.skipped[f"example of the input attack {name!r}"] = "it has rows of the evaluation in it"
            continue
        found[name] = text
    return found


def _rows(texts: Sequence[str], text_field: str | None, as_messages: bool, before: str = "") -> Dataset:
    rows: dict[str, list[Any]] = {
        "prompt": [f"{before} {text}" if before else text for text in texts],
        "completion": [f" answer {i % 2 + 1}" for i in range(len(texts))],
    }
    if as_messages:
        roles = {"prompt": "user", "completion": "assistant"}
        rows = {
            name: [[{"role": roles[name], "content": text.strip()}] for text in some] for name, some in rows.items()
        }
    return Dataset.from_dict(rows if text_field is None else rows | {text_field: list(texts)})


def _in_lines(prompt: Any) -> str:
    """A prompt as one text: itself, or a line for each message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {content_of(message) or ''}" for message in prompt)


def _holds_rows(text: str, suite: Suite) -> bool:
    """Whether a prompt or a text of the evaluation's rows stands in an example."""
    return any(
        one in text
        for rows in suite.splits.values()
        for column in ("prompt", suite.collator.encoder.text_field)
        if column is not None and column in rows.column_names
        for value in column_values(rows, column)
        for one in texts_of(value)
        if one.strip()
    )
