"""Unicode's normal forms, in a time that grows with the text alone."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import chain
from typing import Literal

# Signs on one letter that are still put in order by `unicodedata`, in a time that grows with their square.
MOST_SIGNS = 32


def normal_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """`unicodedata.normalize`, which takes a minute for a letter with 200,000 signs on it.

    Args:
        form: the normal form.
        text: the text.
    """
    if text.isascii():
        return text
    decomposition: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"
    signs = [each for each in set(text) if _is_sign(decomposition, each)]
    if sum(map(text.count, signs)) > MOST_SIGNS:

        def in_order(found: re.Match[str]) -> str:
            parts = chain.from_iterable(unicodedata.normalize(decomposition, each) for each in found.group())
            return "".join(sorted(parts, key=unicodedata.combining))

        text = re.sub(f"[{re.escape(''.join(signs))}]{{{MOST_SIGNS},}}", in_order, text)
    return unicodedata.normalize(form, text)


@cache
def _is_sign(decomposition: Literal["NFD", "NFKD"], character: str) -> bool:
    """Whether a character is a sign on the letter before it, whose place among others the normal form changes."""
    return all(map(unicodedata.combining, unicodedata.normalize(decomposition, character)))
