"""Misspelled words, read as the nearest of the words that a gate knows."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from rapidfuzz.distance import OSA
from rapidfuzz.process import extract
from spellchecker import SpellChecker

from ..records.digests import digest
from .disguises import compatible
from .files import SavedGate

logger = logging.getLogger(__name__)

WORD = re.compile(r"\w+")
# Letters of the shortest known words that may have an edit, and two, unless asked otherwise.
ONE_EDIT, TWO_EDITS = 3, 7
# Groups of characters, by which most known words are told to be far from a word before edits are counted.
GROUPS = 128
# Words whose near ones are kept between calls.
CACHED_WORDS = 50_000


class Spelling:
    """Known words, of which a misspelled one is read as the nearest.

    An edit drops, adds or changes a character, or swaps two neighbors. Known words, numbers and words of an English
    dictionary are read as they are.

    Args:
        words: known words in lower case, and what each counts: of equally near ones that which counts most is taken.
        one_edit: letters of the shortest known words that a word with an edit is read as.
        two_edits: letters of the shortest known words that a word with two edits is read as.

    Source: edits as in Damerau, *A Technique for Computer Detection and Correction of Spelling Errors*, Communications
        of the ACM 7(3), 1964, of which none is within another (optimal string alignment).
    """

    def __init__(self, words: Mapping[str, float], one_edit: int = ONE_EDIT, two_edits: int = TWO_EDITS) -> None:
        self.words, self.one_edit, self.two_edits = words, one_edit, two_edits
        self._candidates = [word for word in words if num_letters(word) >= one_edit]
        self._has = np.zeros((GROUPS, len(self._candidates)), dtype=np.int16)
        for i, word in enumerate(self._candidates):
            self._has[groups_of(word), i] = 1
        self._num_groups = self._has.sum(axis=0, dtype=np.int16)
        self._cache: dict[str, list[str]] = {}

    def corrected(self, texts: Sequence[str]) -> list[str]:
        """Texts with each unknown word as the nearest known one; a text without such words as it was given."""
        found: dict[str, str] = {}

        def read(match: re.Match[str]) -> str:
            word = match.group()
            if word not in found:
                is_right = word in self.words or word in english_words()
                found[word] = next(iter([] if is_right else self.near(word)), word)
            return found[word]

        corrected = []
        for text in texts:
            plain = compatible(text)
            other = WORD.sub(read, plain)
            corrected.append(text if other == plain else other)
        return corrected

    def near(self, word: str) -> list[str]:
        """Known words that a word in lower case may be misspelled from, the nearest first."""
        if (known := self._cache.get(word)) is not None:
            return known
        if len(self._cache) >= CACHED_WORDS:
            self._cache = {}
        found = self._cache[word] = self._search(word)  # by now another thread may have emptied the cache
        return found

    def _search(self, word: str) -> list[str]:
        num = num_letters(word)
        if num < self.one_edit - 1:
            return []
        edits = 2 if num >= self.two_edits - 2 else 1
        found = extract(word, self._like(word, edits), scorer=OSA.distance, score_cutoff=edits, limit=None)
        ranked = [
            (distance, -self.words[known], known)
            for known, distance, _ in found
            if distance == 1 or (distance == 2 and num_letters(known) >= self.two_edits)
        ]
        return [known for _, _, known in sorted(ranked)]

    def _like(self, word: str, edits: int) -> list[str]:
        """The candidates that may be so many edits away: an edit adds a group of characters, drops one, or both."""
        groups = groups_of(word)
        differing = self._num_groups + len(groups) - 2 * self._has[groups].sum(axis=0, dtype=np.int16)
        return [self._candidates[i] for i in np.flatnonzero(differing <= 2 * edits)]


def check_spelling(spelling: Any) -> None:
    """Raise unless an argument `spelling` is a bool."""
    if not isinstance(spelling, bool):
        raise TypeError(f"spelling={spelling!r}; expected True or False.")


def spelling_settings(spelling: bool) -> dict[str, Any]:
    """The fields of a saved gate that say whether it reads misspelled words, and by which dictionary."""
    return {"spelling": spelling, "dictionary_sha256": dictionary_digest()} if spelling else {"spelling": spelling}


def read_spelling(saved: SavedGate) -> bool:
    """Whether a saved gate reads misspelled words. Of another dictionary than this machine's is warned.

    Raises:
        ValueError: if a field is damaged.
    """
    saved.fields.setdefault("spelling", False)  # gates that were saved before there was any
    saved.fields.setdefault("dictionary_sha256", None)  # and those saved before it was noted
    saved.check(
        {
            "spelling": (lambda value: isinstance(value, bool), "true or false"),
            "dictionary_sha256": (lambda value: value is None or isinstance(value, str), "text, or null"),
        }
    )
    spelling, expected = saved.fields["spelling"], saved.fields["dictionary_sha256"]
    if spelling and expected not in (None, found := dictionary_digest()):
        logger.warning(
            "%s reads misspelled words by a dictionary whose SHA-256 is %s; that of pyspellchecker %s here is %s. The "
            "gate may flag other texts than it did, and its report and evaluations are of the other dictionary. "
            "Install the version that it was saved with; or measure it again and save it.",
            saved.path,
            expected,
            version("pyspellchecker"),
            found,
        )
    return spelling


@cache
def dictionary_digest() -> str:
    """Digest of the English dictionary."""
    return digest(sorted(english_words()))


@cache
def english_words() -> frozenset[str]:
    """Words of English, names among them, which are not misspelled from others: *wide* from *Wilde*."""
    return frozenset(SpellChecker(language="en").word_frequency.keys())


def num_letters(word: str) -> int:
    """Letters of a word, without its digits."""
    return sum(map(str.isalpha, word))


def groups_of(word: str) -> list[int]:
    """The groups that the characters of a word are in."""
    return list({ord(each) % GROUPS for each in word})
