"""Disguises of words: misspelt, in look-alike letters, or with their letters apart.

A reader, and mostly the model, still knows who is meant; a filter that looks for a name does not.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from ...data.characters import whole_words
from ...data.checks import checked_names
from ...data.conversations import content_of, with_content
from .changes import (
    Row,
    changed_rows,
    changed_texts,
    check_prompts,
    is_conversation,
    num_system_messages,
    question_of,
    with_question,
)

# Words disguised in a text without names.
NUM_WORDS = 3
LETTERS = re.compile(r"[^\W\d_]+")
# Cyrillic and Greek letters that look like Latin ones, as in the confusables of Unicode Technical Standard 39.
LOOK_ALIKES = str.maketrans(
    "ABCEHIJKMNOPSTXYZacdehijopqsvwxy",
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u039d\u041e\u0420\u0405\u0422\u0425\u03a5\u0396"
    "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u043e\u0440\u051b\u0455\u03bd\u051d\u0445\u0443",
)


def misspelt(
    rows: Dataset, names: Sequence[str] = (), num_edits: int = 1, text_field: str | None = None, seed: int = 0
) -> Dataset:
    """Misspell the words of names: a letter dropped, doubled, or swapped with the next, but for a word's first letter.

    Args:
        rows: `prompt`, a text or messages, and `completion`.
        names: full names, found as whole words in any letter case, of conversations in all messages behind the
            system's. A question without any of them, such as a retain row's, is changed in its three longest words
            instead.
        num_edits: letters that are changed in each word, 1 or 2.
        text_field: the column whose text stands in the prompt, as the collator's: only that text is changed. None
            changes whole prompts, or messages.
        seed: seed of the draws; each row has its own.

    Raises:
        ValueError, TypeError: if `num_edits` is neither 1 nor 2, a name is empty, no prompt changes, or the rows are
            invalid.

    Source: swaps, drops and additions of characters in Pruthi et al., *Combating Adversarial Misspellings with Robust
        Word Recognition*, https://arxiv.org/abs/1905.11268
    """
    if num_edits not in (1, 2):
        raise ValueError(f"num_edits={num_edits!r}; expected 1 or 2 letters to change in each word.")

    def misspell(draws: random.Random, name: str) -> str:
        def edited(found: re.Match[str]) -> str:
            word = found.group()
            for _ in range(num_edits):
                word = _with_an_edit(draws, word, found.group())
            return word

        return LETTERS.sub(edited, name)

    return _disguised(rows, names, text_field, seed, misspell)


def look_alikes(rows: Dataset, names: Sequence[str] = (), text_field: str | None = None) -> Dataset:
    """Write names in Cyrillic and Greek letters that look like the Latin ones.

    Args:
        rows: `prompt`, a text or messages, and `completion`.
        names: as `misspelt`.
        text_field: as `misspelt`.

    Raises:
        ValueError, TypeError: if a name is empty, no prompt changes, or the rows are invalid.

    Source: homoglyphs in Boucher et al., *Bad Characters: Imperceptible NLP Attacks*, https://arxiv.org/abs/2106.09898
    """
    return _disguised(rows, names, text_field, 0, lambda draws, word: word.translate(LOOK_ALIKES))


def letters_apart(
    rows: Dataset, names: Sequence[str] = (), separator: str = " ", text_field: str | None = None
) -> Dataset:
    """Put a space or a sign between the letters of names: `"J a n e"`, `"J-a-n-e"`.

    Args:
        rows: `prompt`, a text or messages, and `completion`.
        names: as `misspelt`.
        separator: what is put between letters of a word.
        text_field: as `misspelt`.

    Raises:
        ValueError, TypeError: if the separator is empty, a name is, no prompt changes, or the rows are invalid.
    """
    if not separator:
        raise ValueError("separator='' is empty; expected what to put between letters, such as ' ' or '-'.")

    def apart(draws: random.Random, word: str) -> str:
        return LETTERS.sub(lambda found: separator.join(found.group()), word)

    return _disguised(rows, names, text_field, 0, apart)


def _disguised(
    rows: Dataset,
    names: Sequence[str],
    text_field: str | None,
    seed: int,
    change: Callable[[random.Random, str], str],
) -> Dataset:
    """Rows with the names in their texts changed, each by itself; the longest words where no name is.

    Of conversations without a text field names are changed in all messages behind the system's, tool calls included,
    since a filter that reads the whole would find them there.
    """
    pattern = _pattern_of(checked_names("names", names)) if names else None

    def disguise(draws: random.Random, text: str) -> str:
        spans = [found.span() for found in pattern.finditer(text)] if pattern else []
        pieces, end = [], 0
        for start, stop in spans or _longest_words(text):
            pieces += [text[end:start], change(draws, text[start:stop])]
            end = stop
        return "".join([*pieces, text[end:]])

    def disguise_messages(draws: random.Random, row: Row) -> Row:
        prompt, start, named = row["prompt"], num_system_messages(row["prompt"]), []

        def disguise_name(text: str) -> str:
            if not pattern or not pattern.search(text):
                return text
            named.append(text)
            return disguise(draws, text)

        changed = [*prompt[:start], *(_with_texts(message, disguise_name) for message in prompt[start:])]
        if not named:
            changed = with_question(prompt, disguise(draws, question_of(prompt)))
        return {**row, "prompt": changed}

    check_prompts(rows)
    if text_field is None and is_conversation(rows):
        return changed_rows(rows, seed, disguise_messages)
    return changed_texts(rows, text_field, seed, disguise)


def _with_texts(message: Row, change: Callable[[str], str]) -> Row:
    """A message with its text changed, and every text of its tool calls."""
    text, calls = content_of(message) or "", message.get("tool_calls")
    if (changed := change(text)) != text:
        message = with_content(message, changed)
    return {**message, "tool_calls": _with_strings(calls, change)} if calls else message


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _with_strings(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_strings(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _pattern_of(names: Sequence[str]) -> re.Pattern[str]:
    """Finds names as whole words in any letter case, white space and encoding of accents; of two, the longer."""
    encoded = {unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")}
    in_order = sorted(encoded, key=lambda name: (-len(name), name))
    return re.compile(whole_words(in_order), re.IGNORECASE)


def _longest_words(text: str) -> list[tuple[int, int]]:
    """Spans of the longest words, the earlier of equal ones, in the text's order."""
    spans = [found.span() for found in LETTERS.finditer(text)]
    return sorted(sorted(spans, key=lambda span: span[0] - span[1])[:NUM_WORDS])


def _with_an_edit(draws: random.Random, word: str, original: str) -> str:
    """The word with a letter after its first dropped, doubled, or swapped with the next, and other than the original.

    A word of one letter is doubled.
    """
    i = draws.randrange(min(1, len(word) - 1), len(word))
    ways = [word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]]
    if i + 1 < len(word):
        ways.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    return draws.choice([way for way in ways if way and way not in (original, word)] or [word])
