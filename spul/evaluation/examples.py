"""Examples of the attacks on the input, each on a row made up for it: reports show no rows of the data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset

from ..data.conversations import content_of
from .aggregation import in_words
from .attacks.changes import InapplicableError, is_conversation, with_prompts_changed
from .attacks.usual import STAND_IN, TURN_UNIT, checked_attacks
from .suite import Suite

OTHERS = tuple(f"Play number {i} has a fine cast and a poor script." for i in range(1, 65))
OWN = "functions of your own may put rows of the data into prompts, which are not shown"


def attack_examples(suite: Suite, made: Collection[tuple[str, int | None]]) -> dict[str, str]:
    """A made-up row, a text or a conversation as those of the evaluation, as each attack on the input changes it.

    Attacks by the user's own functions may put rows of the data into a prompt, in any form. Of those there is no
    example; `suite.skipped` says so. Nor is there one of an attack that cannot be made on the row.

    Args:
        suite: models, rows and settings.
        made: name and level of the attacks that the evaluation makes.

    Returns:
        The changed prompt by the attack's name in the report; of a conversation a line for each message, its role
        first.
    """
    settings, text_field = suite.attacks, suite.collator.encoder.text_field
    if settings.inputs is not None:
        suite.skipped["examples of the input attacks"] = OWN
        return {}
    if ("paraphrase", None) in made:
        suite.skipped["example of the input attack 'paraphrase'"] = OWN
    as_messages = is_conversation(suite.splits["test_forget"])
    row = _rows([STAND_IN], text_field, as_messages, " ".join(settings.wording or ()))
    others = _rows(OTHERS, text_field, as_messages)
    attacks = dataclasses.replace(settings, paraphrase=None)
    found = {}
    for key, change in checked_attacks(attacks.usual_attacks(text_field, others, others, suite.seed)).items():
        name = in_words(*key, TURN_UNIT)
        if key in made:
            with contextlib.suppress(InapplicableError):
                found[name] = _in_lines(with_prompts_changed(row, change, name)[0]["prompt"])
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
