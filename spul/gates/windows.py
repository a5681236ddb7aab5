"""Passages of a text: a forget question inside a long conversation, or in disguise, is scored by itself, too."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from ..records.fields import is_count
from .disguises import in_plain_letters, undisguised

# A window has at least so many characters: less is no text to judge by.
SHORTEST = 32
# The share of forget texts that fit into a window.
COVERED = 0.95
# Other windows of a gate by wording are so many times smaller than the largest: in a small one, a name outweighs what
# is around it.
SCALES = (2, 4, 8)
# A window begins and ends between words, unless a word is longer than this many characters.
LONGEST_WORD = 32
SPACE = re.compile(r"\s")


def window_size(forget_texts: Sequence[str]) -> int:
    """The size of windows, in characters, into which nearly all forget texts fit."""
    return max(SHORTEST, int(np.quantile([len(text) for text in forget_texts], COVERED, method="higher")))


def window_sizes(forget_texts: Sequence[str]) -> list[int]:
    """The sizes of windows, in characters, the largest first, into which nearly all forget texts fit."""
    return _scaled(window_size(forget_texts))


def is_window_size(value: object) -> bool:
    """Whether a value is a size that `window_size` can return."""
    return is_count(value, least=SHORTEST)


def is_window_sizes(value: object) -> bool:
    """Whether a value is a list of sizes that `window_sizes` can return."""
    return isinstance(value, list) and value != [] and all(map(is_window_size, value)) and value == _scaled(value[0])


def _scaled(largest: int) -> list[int]:
    return [largest, *(largest // scale for scale in SCALES if largest // scale >= SHORTEST)]


def with_windows(text: str, size: int) -> list[str]:
    """A text, and its windows if it is longer than one.

    Windows begin every half size, so that any passage of half a size is whole in one of them, and are widened to whole
    words.

    Args:
        text: the text.
        size: characters of a window.
    """
    if len(text) <= size:
        return [text]
    last = len(text) - size
    starts = [*range(0, last, max(1, size // 2)), last]
    spaces = [-1, *(found.start() for found in SPACE.finditer(text)), len(text)]
    windows = (text[slice(*_whole_words(spaces, start, start + size))] for start in starts)
    return [text, *(window for window in windows if not window.isspace())]


def passages(text: str, *sizes: int, by_character: bool = False) -> list[str]:
    """Passages that a text is scored by: itself and its windows, and the same without its disguises if it has any.

    Args:
        text: the text.
        sizes: characters of a window, of each scale.
        by_character: whether invisible and full-width characters are disguises, too, for what reads them as they are.
    """
    readings = dict.fromkeys((text, undisguised(in_plain_letters(text) if by_character else text)))
    return list(dict.fromkeys(passage for read in readings for size in sizes for passage in with_windows(read, size)))


def highest_scores(score: Callable[[list[str]], np.ndarray], texts: Sequence[str], *sizes: int) -> np.ndarray:
    """The highest score among a text's passages, for each text: float64 (texts,).

    Args:
        score: from texts to their scores.
        texts: one or more texts.
        sizes: characters of a window, of each scale.
    """
    pieces = [passages(text, *sizes) for text in texts]
    scores = score([piece for each in pieces for piece in each])
    return highest_of(scores, pieces)


def highest_of(scores: np.ndarray, pieces: Sequence[Sequence[str]]) -> np.ndarray:
    """The highest score of each text, (texts,), from those of all texts' pieces, in their order; NaN where one is.

    Args:
        scores: (pieces of all texts,).
        pieces: pieces of each text, at least one.
    """
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    return np.maximum.reduceat(scores, starts) if len(starts) else np.zeros(0)


def _whole_words(spaces: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """Start and end widened to whole words, by the places of spaces and of both ends of the text."""
    before, after = spaces[bisect_left(spaces, start) - 1] + 1, spaces[bisect_left(spaces, end)]
    return max(before, start - LONGEST_WORD), min(after, end + LONGEST_WORD)
