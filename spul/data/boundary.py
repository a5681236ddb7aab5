"""The boundary of a text prompt and its completion: whether a tokenizer sees there what was meant."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from .rows import shortened

# Characters on each side of a boundary of prompt and completion by which it counts as seen, and boundaries checked.
BOUNDARY_WIDTH, MAX_BOUNDARIES = 16, 256
# Characters after which a word follows without a space.
OPENING = "([{<\"'`“‘«„¿¡-–—/\\_#@$="  # noqa: RUF001
# Scripts without spaces between words that are not of East Asian width.
WITHOUT_SPACES = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")


def boundary_of(prompt: str, text: str) -> tuple[str, str]:
    """The end of a prompt and the start of its completion, by which their boundary counts as seen."""
    return prompt[-BOUNDARY_WIDTH:], text[:BOUNDARY_WIDTH]


def boundary_fault(
    tokenizer: Any, prompt: str, completion: str, apart: Sequence[int], together: Sequence[int], last: int
) -> str | None:
    """The fault where a completion follows its prompt; None if there is none.

    Args:
        tokenizer: the tokenizer.
        prompt: the prompt.
        completion: the completion.
        apart: token ids of the prompt, then of the completion, as trained.
        together: token ids of both as one text.
        last: the last token id of the prompt.

    Returns:
        A sentence that shows the tokens: where the completion merges with the prompt's last token, or where it lacks
        the space before it and the tokenizer has other tokens for it with one.
    """
    shown = shortened(completion, 60)
    if list(apart) != list(together):
        first = next((i for i, (a, b) in enumerate(zip(apart, together, strict=False)) if a != b), None)
        start = max(0, (min(len(apart), len(together)) if first is None else first) - 1)
        return (
            f"the completion {shown!r} merges with the end of its prompt, {prompt[-20:]!r}: as one text they end "
            f"in the tokens {_shown(tokenizer, together[start:])}, but are used as "
            f"{_shown(tokenizer, apart[start:])}. Move a space from the end of the prompt to the start of the "
            "completion, or end the prompt with a punctuation mark or a new line"
        )
    if not _wants_space(prompt, completion) or last in tokenizer.added_tokens_decoder:
        return None
    without, with_space = (_words(tokenizer, ":" + space + completion) for space in ("", " "))
    if without == with_space:
        return None
    return (
        f"the completion {shown!r} has no space before it, and follows {prompt[-20:]!r}: its tokens are "
        f"{without[:8]}, with a space {with_space[:8]}, which a model rather expects after a word or a "
        f"colon. Write {' ' + shown!r} in completions and generic completions alike"
    )


def _wants_space(prompt: str, completion: str) -> bool:
    """Whether a space usually stands between two texts: a word begins, in a script that separates words."""
    before, first = prompt[-1:], completion[:1]
    if not before or before.isspace() or before in OPENING or not first.isalnum():
        return False
    return unicodedata.east_asian_width(first) not in "WF" and not unicodedata.name(first, "").startswith(
        WITHOUT_SPACES
    )


def _words(tokenizer: Any, text: str) -> list[str]:
    """The tokens of a text after its first one, which stands for the end of a prompt."""
    return [str(token) for token in tokenizer.tokenize(text)][1:]


def _shown(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))][:8]
