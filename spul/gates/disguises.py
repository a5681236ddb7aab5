"""Disguises undone: a text as a reader reads it who is not fooled by its characters."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache, partial

from confusable_homoglyphs import confusables

ASCII = string.ascii_letters + string.digits
WORD = re.compile(r"[^\W\d_]+")
LETTER = r"[^\W\d_]"
# Three or more letters, each a word of its own, with the same separator or with single signs between them.
APART = tuple(
    re.compile(rf"(?<!\w){LETTER}{rest}(?!\w)")
    for rest in (
        rf"(?P<separator>[^\w\n]{{1,3}}|_){LETTER}(?:(?P=separator){LETTER})+",
        rf"(?:(?:_|[ \t]|[ ]?[^\w\s][ ]?){LETTER}){{2,}}",
    )
)


def compatible(text: str) -> str:
    """A text in compatible characters (Unicode NFKC, letter case folded), without invisible ones (class Cf)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(each for each in folded if unicodedata.category(each) != "Cf")


def undisguised(text: str) -> str:
    """A text with look-alike letters as the Latin ones they imitate and with letters that stand apart joined.

    Letters of other alphabets are changed in words that have a Latin letter, too, and in every word if most letters of
    the text are Latin, where marks that strike letters out are dropped as well. Three letters in a row and more that
    each stand alone become a word: `"J a n e"`, `"J-a-n-e"`. Misspelled words stay as they are.

    Args:
        text: the text.

    Returns:
        The text itself if nothing in it is disguised.

    Source: Unicode Technical Standard 39, *Unicode Security Mechanisms*, confusable characters, by the table of the
        package confusable-homoglyphs.
    """
    read = text if text.isascii() else _in_latin(text)
    for pattern in APART:
        read = pattern.sub(lambda found: "".join(WORD.findall(found.group())), read)
    return read


def _in_latin(text: str) -> str:
    """A text with the look-alikes of Latin letters as these, where they cannot be another language's words."""
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(each for each in plain if unicodedata.category(each) != "Cf")
    letters = WORD.findall(plain)
    table = look_alikes()
    if 2 * sum(each.isascii() for word in letters for each in word) > sum(map(len, letters)):
        read = "".join(each for each in plain if unicodedata.category(each) not in ("Mn", "Me")).translate(table)
    else:
        read = WORD.sub(
            lambda found: found.group().translate(table) if re.search("[A-Za-z]", found.group()) else found.group(),
            plain,
        )
    return text if read == plain else read


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
