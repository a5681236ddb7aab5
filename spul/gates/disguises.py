"""Disguises undone: a text as a reader reads it who is not fooled by its characters."""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from itertools import chain

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
# An apostrophe that ends no elision, such as "l'ange", and begins no contraction, such as "we're".
APOSTROPHE = r"(?i:(?<!\b[cdjlmnst])(?<!\bqu)['\u2019](?!(?:[dmst]|ll|re|ve)\b))"
# Signs between letters or digits, without apostrophes and with them.
WITHIN = tuple(
    re.compile(rf"(?<=[^\W_])(?:{sign}|_)+(?=[^\W_])") for sign in (r"[^\w\s'\u2019]", rf"[^\w\s'\u2019]|{APOSTROPHE}")
)
# A tag, and brackets, quotes and signs of emphasis around words.
TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
AROUND = r"[*~\"'\u2018-\u201f\u00ab\u00bb()\[\]{}]"
MARKUP = re.compile(rf"(?<!\S){AROUND}+|(?<!{AROUND}){AROUND}+(?!\S)")
# A hyphen, soft or not, at the end of a line.
AT_LINE_END = re.compile(r"(?<=[^\W\d_])[-\u00ad\u2010][^\S\n]*\n\s*(?=[^\W\d_])")
# Zeros in front of the number of an HTML reference, or a number beyond all characters: Python refuses long ones.
NO_NUMBER = re.compile(r"&#0*(?:[1-9][0-9]{7,})?")
# Letters that Unicode does not call compatible with plain ones, and where they are; invisible fillers of Hangul.
STYLED = re.compile(r"(?:NEGATIVE (?:CIRCLED|SQUARED) LATIN CAPITAL LETTER|LATIN LETTER SMALL CAPITAL) ([A-Z])")
STYLED_BLOCKS = (range(0x250, 0x2B0), range(0x1D00, 0x1D80), range(0xA720, 0xA800), range(0x1F150, 0x1F18A))
FILLERS = dict.fromkeys((0x115F, 0x1160, 0x3164, 0xFFA0))
# Letters with strokes, and joined ones, that Unicode does not take apart.
WITHOUT_STROKES = str.maketrans(
    {"\u00f8": "o", "\u0142": "l", "\u0111": "d", "\u0127": "h", "\u0131": "i", "\u00e6": "ae", "\u0153": "oe"}
)


def compatible(text: str) -> str:
    """A text in compatible characters (Unicode NFKC, letter case folded), without invisible ones (class Cf)."""
    return _visible(normal_form("NFKC", text).casefold())


def without_signs_within(text: str, apostrophes: bool = False) -> list[str]:
    """A text with a space for signs between letters or digits, as in `"jane-doe"`, and with nothing in their place.

    Args:
        text: the text.
        apostrophes: whether these count, but for those of elisions and contractions.
    """
    within = WITHIN[apostrophes]
    return [within.sub(" ", text), within.sub("", text)] if within.search(text) else [text]


def without_markup(text: str) -> str:
    """A text without tags, and without brackets, quotes and signs of emphasis around words."""
    return MARKUP.sub("", TAG.sub("", text))


def without_accents(text: str) -> str:
    """A text in lower case without the accents and strokes on its letters, if these are all Latin."""
    if text.isascii():
        return text
    apart = unicodedata.normalize("NFD", text.translate(WITHOUT_STROKES))
    plain = "".join(each for each in apart if not unicodedata.combining(each))
    return plain if plain.isascii() else text


def readable(text: str) -> str:
    """A text as it is shown: HTML's references as characters, words whole that a line's end hyphenates.

    Small capitals and letters in black circles and squares become plain ones, and Hangul fillers go.
    """
    if "&" in text:
        text = html.unescape(NO_NUMBER.sub("&#", text))
    if "\n" in text:
        text = AT_LINE_END.sub("", text)
    return text if text.isascii() else _without_styles(text)


def in_plain_letters(text: str) -> str:
    """A text without invisible characters, and with letters such as full-width and styled ones as the ASCII ones.

    For what reads characters as they are: `compatible` changes signs and letter case as well.
    """
    if text.isascii():
        return text
    return "".join(map(_plain_letter, _without_styles(text)))


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


def _without_styles(text: str) -> str:
    """A text with small capitals and letters in black circles and squares as plain ones, without Hangul fillers."""
    return text.translate(styled()).translate(FILLERS)


def _visible(text: str) -> str:
    """A text in compatible characters, without invisible ones."""
    if text.isascii():
        return text
    return _without(normal_form("NFKC", text), lambda each: unicodedata.category(each) == "Cf")


@cache
def _plain_letter(each: str) -> str:
    if unicodedata.category(each) == "Cf":
        return ""
    plain = normal_form("NFKC", each)
    return plain if len(plain) == 1 and plain in string.ascii_letters else each


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


@cache
def styled() -> dict[int, str]:
    """The letter of each small capital, and of each in a black circle or square, by code point."""
    names = {code: STYLED.fullmatch(unicodedata.name(chr(code), "")) for code in chain(*STYLED_BLOCKS)}
    return {code: found.group(1).lower() for code, found in names.items() if found}
