"""The usual attacks on the input: case, spaces, disguises, jailbreaks, turns, mixed queries, documents, rewording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from datasets import Dataset

from ...data.conversations import comparable
from ...data.rows import column_values
from ...records.fields import is_count
from ..aggregation import in_words
from .changes import is_conversation
from .disguises import letters_apart, look_alikes, misspelt
from .inputs import (
    JAILBREAKS,
    WITHOUT,
    diluted,
    letter_case,
    paraphrase,
    reworded,
    whitespace_noise,
    with_prefix,
    with_suffix,
)
from .queries import chained, in_document, mixed_query

TURNS = (1, 4)
DOCUMENT_WORDS = (300,)
STAND_IN = "The new play with Ada Example is a quiet delight, and far too short."
"""Text of the made-up row by which a report shows what attacks ask; no report shows rows of the data."""

ASKED: tuple[Literal["first", "second"], ...] = ("first", "second")
DILUTED, TURN_UNIT = "diluted", ("turn", "turns")
InputAttack = Callable[[Dataset], Dataset]
InputAttacks = Mapping[str | tuple[str, int], InputAttack]
"""Attacks on the input, each from rows to attacked rows, by name, or by name and level (the number of turns)."""


def checked_attacks(attacks: InputAttacks) -> dict[tuple[str, int | None], InputAttack]:
    """Attacks by name and level.

    Raises:
        ValueError: if a key is neither a name nor a name with a level of at least 0, or it is that of the unchanged
            rows, or two would have the same wording in a report.
    """
    found: dict[tuple[str, int | None], InputAttack] = {}
    for key, attack in attacks.items():
        name, level = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        is_level = level is None or is_count(level)
        if not isinstance(name, str) or not name.strip() or not is_level:
            raise ValueError(f"inputs has the key {key!r}; expected a name, or (name, level) with a whole number.")
        if name == WITHOUT:
            raise ValueError(f"an input attack is called {WITHOUT!r}, the name of the unchanged rows; rename it.")
        found[name, level] = attack
    words = [in_words(name, level, TURN_UNIT) for name, level in found]
    if len(set(words)) < len(words) or len(found) < len(attacks):
        raise ValueError(f"inputs has the keys {list(attacks)}, of which some read alike in a report; rename one.")
    return found


def chosen_attacks(attacks: InputAttacks, names: Sequence[str]) -> dict[str | tuple[str, int], InputAttack]:
    """Some of the attacks, by name; a name stands for the attack at all of its levels.

    Args:
        attacks: by name, or by name and level.
        names: those to take.

    Raises:
        ValueError: if there is none of a name.
    """
    known = list(dict.fromkeys(key[0] if isinstance(key, tuple) else key for key in attacks))
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"there is no input attack {unknown[0]!r} on these rows; expected some of {', '.join(known)}. Turns need "
            "other questions, and queries and documents a text_field where prompts are texts."
        )
    return {key: attack for key, attack in attacks.items() if (key[0] if isinstance(key, tuple) else key) in names}


def usual_names(
    turns: Sequence[int] = TURNS, document_words: Sequence[int] = DOCUMENT_WORDS, of_caller: bool = True
) -> list[str]:
    """The names of all usual attacks on the input, whether or not some rows take them.

    Args:
        turns, document_words: as of `usual_attacks`.
        of_caller: whether those are among them that are made of a function or texts of the caller's.
    """
    rows = Dataset.from_dict({"prompt": [str(i) for i in range(max(turns) + 1)]})
    own: dict[str, Any] = {"rewrite": str, "wording": {}} if of_caller else {}
    attacks = usual_attacks("text", rows, turns=turns, document_words=document_words, other_rows=rows, **own)
    return list(dict.fromkeys(key[0] if isinstance(key, tuple) else key for key in attacks))


def usual_attacks(
    text_field: str | None,
    filler_rows: Dataset,
    seed: int = 0,
    rewrite: Callable[[str], str] | None = None,
    wording: Mapping[str, str] | None = None,
    turns: Sequence[int] = TURNS,
    names: Sequence[str] = (),
    other_rows: Dataset | None = None,
    document_words: Sequence[int] = DOCUMENT_WORDS,
) -> dict[str | tuple[str, int], InputAttack]:
    """The attacks on the input that an evaluation makes by default, by name; by `("diluted", turns)` those with turns.

    Args:
        text_field: the column whose text stands in the prompt, as the collator's.
        filler_rows: other questions with their answers, the turns of `diluted`.
        seed: seed of the draws.
        rewrite: rewriter of `paraphrase`; without one that attack is skipped.
        wording: replacements of `reworded`; without them that attack is skipped. Requires a `text_field`.
        turns: numbers of turns of `diluted`, 1 and 4 by default. Those that `filler_rows` has too few different
            questions for are skipped.
        names: full names that are disguised where they stand in a text; elsewhere its longest words are.
        other_rows: rows of the other side for `mixed_query`: retain rows if forget rows are attacked, and forget rows
            if retain rows are. Without them that attack is skipped, and so it is for texts without a `text_field`.
        document_words: lengths of the documents of `in_document`, 300 words by default. Skipped for texts without a
            `text_field`.

    Raises:
        ValueError: if `wording` is given without a `text_field`.
    """
    attacks: dict[str | tuple[str, int], InputAttack] = {
        "capitals": partial(letter_case, how="upper", text_field=text_field),
        "small letters": partial(letter_case, how="lower", text_field=text_field),
        "random case": partial(letter_case, how="random", text_field=text_field, seed=seed),
        "spaces": partial(whitespace_noise, share=0.3, text_field=text_field, seed=seed),
    }
    disguises: dict[str, Callable[..., Dataset]] = {
        "misspelt": partial(misspelt, seed=seed),
        "look-alike letters": look_alikes,
        "letters apart": letters_apart,
        "letters hyphenated": partial(letters_apart, separator="-"),
    }
    attacks |= {name: partial(way, names=names, text_field=text_field) for name, way in disguises.items()}
    for i, text in enumerate(JAILBREAKS):
        attacks[f"jailbreak {i + 1} before"] = partial(with_prefix, text=text)
        attacks[f"jailbreak {i + 1} after"] = partial(with_suffix, text=text, text_field=text_field)
    before = [partial(with_prefix, text=text) for text in JAILBREAKS]
    attacks["all jailbreaks before"] = partial(chained, attacks=before)
    different = len(set(map(comparable, column_values(filler_rows, "prompt"))))
    for num in turns:
        if num < different:
            attacks[DILUTED, num] = partial(diluted, filler_rows=filler_rows, num_turns=num, seed=seed)
    if different > 1:
        turn = partial(diluted, filler_rows=filler_rows, num_turns=1, seed=seed)
        attacks["jailbreaks and a turn before"] = partial(chained, attacks=[turn, *before[:2]])
    knows_question = text_field is not None or is_conversation(filler_rows)
    if knows_question:
        for num in document_words:
            attacks[f"in a document of {num} words"] = partial(
                in_document, num_words=num, text_field=text_field, seed=seed
            )
    if knows_question and other_rows is not None:
        for asked in ASKED:
            attacks[f"mixed query, asked {asked}"] = partial(
                mixed_query, other_rows=other_rows, text_field=text_field, asked=asked, seed=seed
            )
    if rewrite is not None:
        attacks["paraphrase"] = partial(paraphrase, rewrite=rewrite, text_field=text_field)
    if wording is not None:
        if text_field is None:
            raise ValueError("wording is given, and text_field=None: name the column whose text stands in the prompt.")
        attacks["reworded"] = partial(reworded, wording=wording, text_field=text_field)
    return attacks
