"""Content of a row: its completion as text, and how texts are compared and shown in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Rows or texts that a message or a report shows as examples.
SHOWN = 3


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


def listed(values: Sequence[str], most: int) -> str:
    """The first values, separated by commas, and the number of the others."""
    more = f", and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more
