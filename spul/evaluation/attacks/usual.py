"""The usual attacks on the input: letter case, spaces, jailbreaks, other turns, paraphrase, wording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from datasets import Dataset

from ...data.rows import column_values
from ..aggregation import in_words
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

TURNS = (1, 4)
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
        is_level = level is None or (isinstance(level, int) and not isinstance(level, bool) and level >= 0)
        if not isinstance(name, str) or not name.strip() or not is_level:
            raise ValueError(f"inputs has the key {key!r}; expected a name, or (name, level) with a whole number.")
        if name == WITHOUT:
            raise ValueError(f"an input attack is called {WITHOUT!r}, the name of the unchanged rows; rename it.")
        found[name, level] = attack
    words = [in_words(name, level, TURN_UNIT) for name, level in found]
    if len(set(words)) < len(words) or len(found) < len(attacks):
        raise ValueError(f"inputs has the keys {list(attacks)}, of which some read alike in a report; rename one.")
    return found


def usual_attacks(
    text_field: str | None,
    filler_rows: Dataset,
    seed: int = 0,
    rewrite: Callable[[str], str] | None = None,
    wording: Mapping[str, str] | None = None,
    turns: Sequence[int] = TURNS,
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

    Raises:
        ValueError: if `wording` is given without a `text_field`.
    """
    attacks: dict[str | tuple[str, int], InputAttack] = {
        "capitals": partial(letter_case, how="upper", text_field=text_field),
        "small letters": partial(letter_case, how="lower", text_field=text_field),
        "random case": partial(letter_case, how="random", text_field=text_field, seed=seed),
        "spaces": partial(whitespace_noise, share=0.3, text_field=text_field, seed=seed),
    }
    for i, text in enumerate(JAILBREAKS):
        attacks[f"jailbreak {i + 1} before"] = partial(with_prefix, text=text)
        attacks[f"jailbreak {i + 1} after"] = partial(with_suffix, text=text, text_field=text_field)
    different = len(set(map(str, column_values(filler_rows, "prompt"))))
    for num in turns:
        if num < different:
            attacks[DILUTED, num] = partial(diluted, filler_rows=filler_rows, num_turns=num, seed=seed)
    if rewrite is not None:
        attacks["paraphrase"] = partial(paraphrase, rewrite=rewrite, text_field=text_field)
    if wording is not None:
        if text_field is None:
            raise ValueError("wording is given, and text_field=None: name the column whose text stands in the prompt.")
        attacks["reworded"] = partial(reworded, wording=wording, text_field=text_field)
    return attacks
