"""Unicode's normal forms, in a time that grows with the text alone; where words begin and end in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import chain, groupby, pairwise
from typing import Literal

# Signs on one letter that are still put in order by `unicodedata`, in a time that grows with their square.
MOST_SIGNS = 32
# Ranges of scripts that write words without spaces between them, or, as Korean, endings without one before them: Thai,
# Lao, Tibetan and Burmese; Hangul; Khmer; Tai scripts; Chinese characters and kana; Yi; Javanese. Each of their
# characters is a word, since only a dictionary would tell longer ones.
UNSPACED = (
    "\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u3096"
    "\u309d-\u309f\u3105-\u312f\u3131-\u318e\u31a0-\u31bf\u3400-\u4dbf\u4e00-\ua4cf\ua960-\ua97f\ua980-\ua9ff\uaa60-\uaadf"
    "\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Katakana, which writes words between those of other kana: a word is as long as it goes.
KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
WORD = rf"(?:[{KATAKANA}]+|(?=\w)[{UNSPACED}]|[^\W{UNSPACED}{KATAKANA}]+)"
"""A word, as a regular expression."""
# What phones and typesetters write for an apostrophe and a hyphen.
TYPESET = str.maketrans(
    {**dict.fromkeys("\u2019\u2018\u02bc\u00b4`", "'"), **dict.fromkeys("\u2010\u2011\u2012\u2013", "-")}
)
_KINDS = re.compile(f"([{UNSPACED}])|([{KATAKANA}])")


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


# ---- words ----


def is_in_word(character: str) -> bool:
    """Whether a character is part of a word; vowel signs, as in Hindi, are, though not \\w in regular expressions."""
    return character.isalnum() or character == "_" or (character != "" and _is_mark(character))


def ends_before(own: str, following: str) -> bool:
    """Whether a word ends between its own last character and the one that follows."""
    return not _is_mark(following) and begins_after(following, own)


def begins_after(before: str, own: str) -> bool:
    """Whether a word begins between the character before it and its own first one."""
    kind = _kind(before)
    return not is_in_word(before) or kind == 1 or (is_in_word(own) and kind != _kind(own))


def words(text: str) -> list[str]:
    """The words of a text; of scripts without spaces between them each character, with the signs on it, is one."""
    found: list[str] = []
    for before, own in pairwise(f" {text}"):
        if is_in_word(own):
            if is_in_word(before) and not ends_before(before, own):
                found[-1] += own
            else:
                found.append(own)
    return found


def is_latin(text: str) -> bool:
    """Whether a text has no letter or digit of another script than Latin; signs such as fractions are of none."""
    return text.isascii() or not any(map(_is_of_other_script, text))


def _is_of_other_script(character: str) -> bool:
    if character <= "\u00ff" or not (character.isalpha() or character.isdecimal()):
        return False
    name = unicodedata.name(character, "")
    return "LATIN" not in name and not name.startswith("MODIFIER LETTER")


def whole_words(names: Iterable[str]) -> str:
    """Names as whole words, with any white space between their words, as a regular expression; the first that fits."""
    return "|".join(
        f"{before}(?:{'|'.join(map(_spelled, group))}){after}" for (before, after), group in groupby(names, _limits)
    )


def _spelled(name: str) -> str:
    return r"\s+".join(map(re.escape, name.split()))


def _limits(name: str) -> tuple[str, str]:
    """Limits before and after a name, as regular expressions, which are the same for most names."""
    first, last = _of_same_word(name.strip()[0]), _of_same_word(name.strip()[-1])
    return (f"(?<!{first})" if first else ""), (f"(?!{last})" if last else "")


def _of_same_word(character: str) -> str:
    """Characters that go on a word which begins or ends in one, as a regular expression; "" for none."""
    if not is_in_word(character):
        return rf"(?-i:[^\W{UNSPACED}])"  # letter case aside, since classes so large take 30 ms to compile with it
    return (rf"(?-i:[^\W{UNSPACED}{KATAKANA}])", "", f"(?-i:[{KATAKANA}])")[_kind(character)]


def _kind(character: str) -> int:
    """1 for a character of a script without spaces, 2 for katakana, 0 for others."""
    found = None if character.isascii() else _KINDS.match(character)
    return 0 if found is None else found.lastindex or 0


def _is_mark(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character)[0] == "M"
