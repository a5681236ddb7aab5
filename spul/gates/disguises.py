"""Disguises undone: a text as a reader reads it who is not fooled by its characters."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache, partial

from confusable_homoglyphs import confusables

from ..data.characters import UNSPACED, normal_form

ASCII = string.ascii_letters + string.digits
LETTER = r"[^\W\d_]"
WORD = re.compile(f"{LETTER}+")
# Three or more letters, each a word of its own, with the same separator or with single signs between them. Characters
# of a script without spaces may stand beside letters of other scripts.
SPACED = rf"[^\W\d_{UNSPACED}]"
FIRST = rf"(?:(?<!\w){LETTER}|(?<=[{UNSPACED}]){SPACED})"
END = rf"(?:(?!\w)|(?<={SPACED})(?=[{UNSPACED}]))"
APART = tuple(
    re.compile(f"{FIRST}{rest}{END}")
    for rest in (
        rf"(?P<separator>\W{{1,5}}|_){LETTER}(?:(?P=separator){LETTER})+",
        rf"(?:(?:_|\s|[ ]?[^\w\s][ ]?){LETTER}){{2,}}",
    )
)
# Signs between letters or digits, but for apostrophes.
WITHIN = re.compile(r"(?<=[^\W_])(?:[^\w\s'\u2019]|_)+(?=[^\W_])")


def compatible(text: str) -> str:
    """A text in compatible characters (Unicode NFKC, letter case folded), without invisible ones (class Cf)."""
    return _visible(normal_form("NFKC", text).casefold())


def without_signs_within(text: str) -> list[str]:
    """A text with a space for signs between letters or digits, as in `"jane-doe"`, and with nothing in their place."""
    return [WITHIN.sub(" ", text), WITHIN.sub("", text)] if WITHIN.search(text) else [text]


def undisguised(text: str) -> str:
    """A text with look-alike letters as the Latin ones they imitate and with letters that stand apart joined.

    Letters of other alphabets are changed in words that have a Latin letter, too. In a line whose letters are mostly
    Latin, or whose others are all look-alikes, they are changed in every word, and marks that strike letters out are
    dropped. Three letters in a row and more that each stand alone become a word: `"J a n e"`, `"J-a-n-e"`. Misspelled
    words stay as they are.

    Args:
        text: the text.

    Returns:
        The text itself if nothing in it is disguised.

    Source: Unicode Technical Standard 39, *Unicode Security Mechanisms*, confusable characters, by the table of the
        package confusable-homoglyphs.
    """
    return without_disguises(text)[0]


def without_disguises(text: str) -> tuple[str, list[str]]:
    """`undisguised`, and the words in it that were joined of letters apart, with one-letter words beside them."""
    plain = read = _visible(text)
    if any(ord(each) in look_alikes() or _is_on_a_letter(each) for each in set(plain) if not each.isascii()):
        lines = plain.splitlines(keepends=True)
        in_latin = {line: _in_latin(line) for line in set(lines)}
        read = "".join(map(in_latin.__getitem__, lines))
    words: list[str] = []

    def join(found: re.Match[str]) -> str:
        run = found.group()
        if any(unicodedata.category(each)[0] == "M" for each in set(run)):  # vowel signs, in alphabets that have them
            return run
        words.append("".join(WORD.findall(run)))
        return words[-1]

    for pattern in APART:
        read = pattern.sub(join, read)
    return (text if read == plain else read), words


def _visible(text: str) -> str:
    """A text in compatible characters, without invisible ones."""
    if text.isascii():
        return text
    return _without(normal_form("NFKC", text), lambda each: unicodedata.category(each) == "Cf")


def _without(text: str, is_dropped: Callable[[str], bool]) -> str:
    for each in filter(is_dropped, set(text)):
        text = text.replace(each, "")
    return text


def _in_latin(line: str) -> str:
    """A line with the look-alikes of Latin letters as these, where they cannot be another language's words."""
    if line.isascii():
        return line
    letters, table = "".join(WORD.findall(line)), look_alikes()
    others = [each for each in letters if not _is_latin(each)]
    if 2 * len(others) < len(letters) or all(ord(each) in table for each in set(others)):
        return _without(line, _is_on_a_letter).translate(table)
    return WORD.sub(
        lambda found: found.group().translate(table) if any(map(_is_latin, found.group())) else found.group(), line
    )


def _is_on_a_letter(sign: str) -> bool:
    return unicodedata.category(sign) in ("Mn", "Me")


@cache
def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


@cache
def look_alikes() -> dict[int, str]:
    """The ASCII letter or digit that each look-alike imitates, by code point; of several, one of its letter case."""

    def rank(look_alike: str, plain: str) -> tuple[bool, bool]:
        return not plain.isalpha(), plain.isupper() != look_alike.isupper()

    data = {one: {other["c"] for other in others} for one, others in confusables.confusables_data.items()}
    imitated: dict[str, set[str]] = {}
    for character, others in data.items():
        for other in others:
            for look_alike, plain in ((character, other), (other, character)):
                if len(look_alike) == len(plain) == 1 and not look_alike.isascii() and plain in ASCII:
                    # "I" is listed as looking like "l", and what looks like either as looking like "l" alone.
                    imitated.setdefault(look_alike, set()).update(
                        one for one in ASCII if one == plain or plain in data.get(one, ())
                    )
    return {ord(one): min(sorted(plain), key=partial(rank, one)) for one, plain in imitated.items()}
