"""Misspelled words, read as those that a gate knows: the nearest, or what pieces, parts, digits or accents spell."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import groupby
from typing import Any

import numpy as np
from rapidfuzz.distance import OSA
from rapidfuzz.process import extract
from spellchecker import SpellChecker

from ..data.characters import UNSPACED
from ..records.digests import digest
from ..records.fields import is_count
from .disguises import APOSTROPHE, compatible, readable, without_accents
from .files import SavedGate

logger = logging.getLogger(__name__)

WORD = re.compile(r"\w+")
# Letters of the shortest known words that may have an edit, and two, unless asked otherwise.
ONE_EDIT, TWO_EDITS = 3, 7
# Rules of reading: 1, of gates that were saved before there were others, has edits alone; 2 pieces with white space
# between them, joined words and digits as well; 3 signs between pieces, and joined words with an edit; 4 all that
# `Spelling` has.
RULES = 4
# Digits as the letters that they stand for, and "1" as the other one. A number with a letter or two behind it, such as
# "100th", is one.
DIGITS = tuple(str.maketrans("0134578", letters) for letters in ("oieastb", "oleastb"))
NUMBER = re.compile(r"\d+\D{0,2}")
# Characters of the shortest word that is joined of pieces, of the longest piece that may be a word of English, and of
# the shortest and longest words that are parted.
LEAST_IN_PIECES, SHORT_PIECE, LEAST_PARTED, MOST_PARTED = 4, 2, 6, 64
# Single letters side by side that are taken for a word's, as where disguises are undone.
LEAST_APART = 3
# Letters of the shortest rest of a parted word that may be misspelled.
LEAST_NEAR = 5
# What may stand between pieces beside white space alone: a few signs, among them apostrophes by rules 4.
GAPS = tuple(
    re.compile(rf"\s?(?:{sign}){{1,3}}\s?(?=\w)") for sign in (r"[^\w\s'\u2019]", rf"[^\w\s'\u2019]|{APOSTROPHE}")
)
# Words of English of two letters; the dictionary also has others.
OF_TWO_LETTERS = frozenset(re.findall("..", "amanasatbebydogoheifinisitmemynoofonorsotoupuswe"))
# Occurrences from which on a word of the dictionary is a common one: of its 160,000 words some 5,000 are, among them
# some names that are words as well, such as Mark and Rose.
COMMON = 10_000
# Words beside which a known one of any length may be parted from a joined word: few words are made of one of these and
# a short name.
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "about after and are because before but by did does for from has have her his how is of our that the their "
        "this what when where which who whose why will with would",
    )
)
HAS_UNSPACED = re.compile(f"[{UNSPACED}]")
# Groups of characters, by which most known words are told to be far from a word before edits are counted.
GROUPS = 128
# Known words that are compared sooner than told to be far.
FEW = 200
# Words whose near ones are kept between calls.
CACHED_WORDS = 50_000


class Spelling:
    """Known words, of which a misspelled one is read as the nearest.

    An edit drops, adds or changes a character, or swaps two neighbors. Known words, numbers and words of an English
    dictionary are read as they are. Before edits are tried, pieces with white space or a few signs between them are
    joined where that gives a known word, letters with accents are read without them, and digits among letters as
    letters; after them, words that were joined are parted, of which one may be misspelled.

    Args:
        words: known words in lower case, and what each counts: of equally near ones that which counts most is taken.
        one_edit: letters of the shortest known words that a word with an edit is read as.
        two_edits: letters of the shortest known words that a word with two edits is read as.
        rules: from 1, of edits alone, to `RULES`.
        keeps_common: whether pieces that are all common words of English stay apart: *put in* is not *Putin*.
        least_joined: letters that the known words in a joined one have in all, at least, unless all others in it are
            function words: with 6 *bachmann* is not *bach mann* where *bach* alone is known, *bybach* is *by bach*.

    Source: edits as in Damerau, *A Technique for Computer Detection and Correction of Spelling Errors*, Communications
        of the ACM 7(3), 1964, of which none is within another (optimal string alignment).
    """

    def __init__(
        self,
        words: Mapping[str, float],
        one_edit: int = ONE_EDIT,
        two_edits: int = TWO_EDITS,
        rules: int = RULES,
        keeps_common: bool = False,
        least_joined: int = 0,
    ) -> None:
        self.words, self.one_edit, self.two_edits, self.rules = words, one_edit, two_edits, rules
        self.keeps_common, self.least_joined = keeps_common, least_joined
        # By their beginnings most words are told to hold no known one, and most pieces to begin none.
        self._beginnings = {word[:num] for word in words for num in range(1, len(word) + 1)}
        self._candidates = [word for word in words if num_letters(word) >= one_edit]
        self._has = np.zeros((GROUPS, len(self._candidates)), dtype=np.int16)
        for i, word in enumerate(self._candidates):
            self._has[groups_of(word), i] = 1
        self._num_groups = self._has.sum(axis=0, dtype=np.int16)
        self._cache: dict[str, list[str]] = {}

    def corrected(self, texts: Sequence[str]) -> list[str]:
        """Texts with each unknown word as known ones; a text without such words as it was given."""
        found: dict[str, str] = {}

        def read(match: re.Match[str]) -> str:
            word = match.group()
            if word not in found:
                found[word] = self._read(word)
            return found[word]

        corrected = []
        for text in texts:
            plain = compatible(text)
            whole = plain if self.rules < 4 else compatible(readable(text))
            parted = whole if self.rules < 3 else whole.replace("_", " ")
            other = WORD.sub(read, whole if self.rules == 1 else self._without_pieces(parted))
            corrected.append(text if other == plain else other)
        return corrected

    def _read(self, word: str) -> str:
        """A word as it is if it is right; else without accents and digits, as the nearest known one, or parted."""
        if self._is_right(word):
            return word
        plain = word if self.rules < 4 else without_accents(word)
        spellings = ([] if plain == word else [plain]) + ([] if self.rules == 1 else with_letters(plain))
        if right := next(filter(self._is_right, spellings), None):
            return right
        if near := next(filter(None, map(self.near, [*spellings, word])), None):
            return near[0]
        return word if self.rules == 1 else self._parted(word)

    def _is_right(self, word: str) -> bool:
        return word in self.words or word in english_words()

    def _without_pieces(self, text: str) -> str:
        """A text with known words that stand in pieces joined; the longest, if several begin at one place."""
        pieces, read, end = list(WORD.finditer(text)), [], 0
        words = [piece.group() for piece in pieces]
        apart: list[bool] = []
        for is_single, group in groupby(words, lambda word: len(word) == 1):
            num = len(list(group))
            apart += [is_single and num >= LEAST_APART] * num
        # No word begins or ends within letters apart: no "sand" in "g e n r e s and".
        for i, first in enumerate(pieces):
            if first.start() < end or (i > 0 and apart[i - 1] and apart[i]):
                continue
            run, joined, last = words[i], "", i
            for j in range(i + 1, len(words)):
                run += words[j]
                if run not in self._beginnings or not self._is_gap(text, pieces[j - 1].end(), pieces[j].start()):
                    break
                is_within = j + 1 < len(words) and apart[j] and apart[j + 1]
                if run in self.words and not is_within and self._is_in_pieces(words[i : j + 1]):
                    joined, last = run, j
            if joined:
                read += [text[end : first.start()], joined]
                end = pieces[last].end()
        return "".join([*read, text[end:]])

    def _is_gap(self, text: str, start: int, end: int) -> bool:
        """Whether what stands between two words, from `start` to `end`, may stand between pieces of one."""
        return text[start:end].isspace() or (self.rules > 2 and GAPS[self.rules > 3].match(text, start) is not None)

    def _is_in_pieces(self, pieces: Sequence[str]) -> bool:
        """Whether words side by side may be one: some is short or not right, and some has more than a letter.

        Single letters are joined where disguises are undone, as many as stand apart: no *chan* of *c h a n g e*.
        """
        word = "".join(pieces)
        if len(word) < LEAST_IN_PIECES or word.isdecimal() or len(word) == len(pieces):
            return False
        if self.keeps_common and common_words().issuperset(pieces):
            return False
        return any(len(piece) <= SHORT_PIECE or not self._is_right(piece) for piece in pieces)

    def _is_part(self, word: str) -> bool:
        """Whether a word of two characters and more may be a part of a joined one."""
        is_english = word in english_words() if len(word) > 2 else self.rules > 2 and word in OF_TWO_LETTERS
        return word in self.words or is_english

    def _parted(self, word: str) -> str:
        """A word as the fewest right ones that it is made of, of equally few those that count most; or as it is.

        A part is a known word of two characters and more, or another one of English of three; one of three is known.
        """
        num = len(word)
        if not LEAST_PARTED <= num <= MOST_PARTED or not word.isalpha() or HAS_UNSPACED.search(word):
            return word
        # Of the best parts up to each character: their number, what they count, and where the last of them starts.
        best: list[tuple[int, float, int] | None] = [(0, 0.0, 0), *[None] * num]
        has_known = any(word[i : i + 3] in self._beginnings for i in range(num - 2))
        for end in range(2, num + 1) if has_known else ():
            ways = []
            for start in range(end - 1):
                part, before = word[start:end], best[start]
                if before and self._is_part(part):
                    ways.append((before[0] + 1, before[1] - self.words.get(part, 0.0), start))
            best[end] = min(ways, default=None)
        parts, end = [], num
        while end and (found := best[end]):
            parts.append(word[found[2] : end])
            end = found[2]
        known = [part for part in parts if part in self.words]
        is_long = len("".join(known)) >= self.least_joined
        if self.rules > 3:
            is_long = is_long or FUNCTION_WORDS.issuperset(part for part in parts if part not in self.words)
        if is_long and not end and max(map(len, known), default=0) > 2:
            return " ".join(reversed(parts))
        return self._parted_near(word) if self.rules > 2 and self._candidates else word

    def _parted_near(self, word: str) -> str:
        """A word as a right one and the nearest known one of the rest, that which counts most; or as it is."""
        found = []
        for i in range(2, len(word) - 1):
            for is_first, right, rest in ((True, word[:i], word[i:]), (False, word[i:], word[:i])):
                if len(rest) >= LEAST_NEAR and self._is_part(right) and (near := self.near(rest)):
                    found.append((-self.words[near[0]], f"{right} {near[0]}" if is_first else f"{near[0]} {right}"))
        return min(found)[1] if found else word

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
        if len(self._candidates) <= FEW:
            return self._candidates
        groups = groups_of(word)
        differing = self._num_groups + len(groups) - 2 * self._has[groups].sum(axis=0, dtype=np.int16)
        return [self._candidates[i] for i in np.flatnonzero(differing <= 2 * edits)]


def check_spelling(spelling: Any) -> None:
    """Raise unless an argument `spelling` is a bool."""
    if not isinstance(spelling, bool):
        raise TypeError(f"spelling={spelling!r}; expected True or False.")


def spelling_settings(spelling: bool, rules: int = 1) -> dict[str, Any]:
    """The fields of a saved gate that say whether it reads misspelled words, by which dictionary and which rules."""
    if not spelling:
        return {"spelling": spelling}
    later = {"spelling_rules": rules} if rules > 1 else {}
    return {"spelling": spelling, "dictionary_sha256": dictionary_digest(), **later}


def read_rules(saved: SavedGate) -> int:
    """The rules of spelling of a saved gate: 1 of those that were saved before there were others.

    Raises:
        ValueError: if they are none of this version.
    """
    saved.fields.setdefault("spelling_rules", 1)
    saved.check(
        {"spelling_rules": (lambda value: is_count(value, least=1) and value <= RULES, f"a number from 1 to {RULES}")}
    )
    return saved.fields["spelling_rules"]


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
    if expected is not None and expected != (found := dictionary_digest()):
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
    return frozenset(_counts())


@cache
def common_words() -> frozenset[str]:
    """The common words of English, which a text has more often than misspelled names that are spelled as they are."""
    return frozenset(word for word, count in _counts().items() if count >= COMMON)


@cache
def _counts() -> Mapping[str, int]:
    return dict(SpellChecker(language="en").word_frequency.items())


def with_letters(word: str) -> list[str]:
    """A word that has digits among its letters with letters in their place, in each way; none of any other word."""
    if word.isalpha() or word.isdecimal() or NUMBER.fullmatch(word):
        return []
    return [other for other in dict.fromkeys(map(word.translate, DIGITS)) if other.isalpha()]


def num_letters(word: str) -> int:
    """Letters of a word, without its digits."""
    return sum(map(str.isalpha, word))


def groups_of(word: str) -> list[int]:
    """The groups that the characters of a word are in."""
    return list({ord(each) % GROUPS for each in word})
