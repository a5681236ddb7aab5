"""The gate by names: a text that names one of certain people, or an alias of theirs, gets the prompt."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ..data.characters import TYPESET
from ..data.checks import checked_names, checked_texts
from ..data.recognizers import WORD as SPELLED
from ..data.recognizers import NameFinder, normalized_name
from ..records.messages import listed
from .disguises import (
    WORD,
    compatible,
    without_accents,
    without_disguises,
    without_markup,
    without_signs_within,
)
from .files import SavedGate, is_texts
from .gate import Gate
from .spelling import (
    RULES,
    Spelling,
    check_spelling,
    common_words,
    english_words,
    num_letters,
    read_rules,
    read_spelling,
    spelling_settings,
)
from .thresholds import GateReport

# Names that the gate's repr shows.
SHOWN_NAMES = 3
# A name of so many letters is looked for in words that were joined of letters apart: in a list of a few letters a
# shorter one is chance. One of more letters is found inside of such a word, too, and names of as many in all inside of
# unknown words: "Bachmann" is no "Bach".
LEAST_JOINED, LEAST_IN_JOINED = 4, 6
# Letters of the shortest words of a name that may have an edit, and two, and of a name of one word: "Jane does" is no
# "Jane Doe".
ONE_EDIT, TWO_EDITS, LEAST_ALONE = 4, 9, 5
# Letters of the shortest word that may have an edit where none may.
NO_EDIT = sys.maxsize


class NameGate(Gate):
    """A gate that flags texts which name one of certain people.

    A name matches as `split_by_entity` matches it: as whole words, in any letter case and with any white space between
    its words; wherever its characters stand in scripts without spaces, such as Chinese. It also matches in compatible
    characters, such as full-width letters, and with invisible ones inside (Unicode NFKC), in look-alike letters of
    other alphabets, with its letters apart, in pieces, joined, with digits for letters, and misspelled.

    A text's score is the number of different people whom it names. No window is needed: a name is found wherever it
    stands.

    Args:
        names: people to forget; of spellings that match each other, the first counts.
        aliases: other spellings and names of some of them, by the name in `names`:
            `{"Jane Doe": ["J. Doe", "Janie"]}`.
        spelling: whether names also match with words misspelled (`Spelling`): an edit in words of four letters and
            more, two in words of nine, but none that makes a common word of English: *Tom for* is not *Tom Ford*. A
            name of one word does if it has five letters, and what stands there is not in an English dictionary at all.
            Other people's names that are as near, such as *Jane Dolle* to *Jane Doyle*, are then flagged, too.
        spelling_rules: the rules of `Spelling`; before 3, names are read as they stand, with letters apart, and
            misspelled, before 4 with their accents.

    Raises:
        TypeError: if `names` or the aliases of one are a single string, or `spelling` is no bool.
        ValueError: if there are no names, one is empty or no text, aliases belong to none of them, or one alias is
            given for two.
    """

    kind = "names"
    threshold = 1.0

    def __init__(
        self,
        names: Sequence[str],
        aliases: Mapping[str, Sequence[str]] | None = None,
        spelling: bool = True,
        spelling_rules: int = RULES,
    ) -> None:
        check_spelling(spelling)
        self.spelling, self.spelling_rules = spelling, spelling_rules
        by_key: dict[str, str] = {}
        for name in checked_names("names", names):
            by_key.setdefault(_key(name), name)
        self.names = list(by_key.values())
        if aliases is not None and not isinstance(aliases, Mapping):
            raise TypeError(f"aliases is a {type(aliases).__name__}; expected a dict: {{{self.names[0]!r}: [...]}}.")
        self.aliases = {name: checked_names(f"aliases[{name!r}]", others) for name, others in (aliases or {}).items()}
        if foreign := [name for name in self.aliases if name not in self.names]:
            raise ValueError(
                f"aliases are given for {foreign[0]!r}, which is not among the names {listed(self.names, 12)}; "
                "expected the spelling of names."
            )
        owners: dict[str, str] = {}
        spellings = [(name, name) for name in self.names]
        spellings += [(alias, name) for name, others in self.aliases.items() for alias in others]
        for one, name in spellings:
            if (owner := owners.setdefault(_key(one), name)) != name:
                raise ValueError(f"{one!r} is given for {owner!r} and for {name!r}; give it for one of them.")
        # Both as given and in compatible characters: "Jane\u2122" holds the name only before it becomes "JaneTM".
        self._owners = {**owners, **{normalized_name(one): name for one, name in spellings}}
        for one, name in spellings:  # "O\u2019Neill" is also found where a text has "O'Neill"
            self._owners.setdefault(_key(one.translate(TYPESET)), name)
        if spelling_rules > 3:  # "Zo\u00eb" is also "Zoe", but "Ros\u00e9" is no "rose"
            for one, name in list(self._owners.items()):
                if (plain := without_accents(one)) not in common_words():
                    self._owners.setdefault(plain, name)
        # "J a n e D o e" is read as one word; initials and names with digits are none that were joined.
        self._joined = []
        for one, name in self._owners.items():
            words = WORD.findall(one)
            if len("".join(words)) >= LEAST_JOINED and max(map(len, words)) > 1 and not re.search(r"\d", one):
                self._joined.append(("".join(words), name))
        self._pieces: Spelling | None = None
        if spelling_rules > 2:  # "Jane Doe" is also "janedoe", "Anne-Marie" also "anne marie"
            for one, name in list(self._owners.items()):
                words = SPELLED.findall(one)
                self._owners.setdefault(normalized_name(without_signs_within(one)[0]), name)
                if len(words) > 1 and len(whole := "".join(words)) >= LEAST_IN_JOINED and whole not in english_words():
                    self._owners.setdefault(whole, name)
            in_names = dict.fromkeys(chain.from_iterable(map(SPELLED.findall, self._owners)), 0.0)
            self._pieces = Spelling(in_names, NO_EDIT, NO_EDIT, spelling_rules, True, LEAST_IN_JOINED)
        self._finder = NameFinder(list(self._owners), typeset=False)  # what is typeset is among them, and the readings
        # Names that also match misspelled, between their first word and their last, and their words.
        self._misspelled: dict[str, tuple[str, list[str]]] = {}
        for one in self._owners:
            words = SPELLED.findall(one) if spelling and (" " in one or num_letters(one) >= LEAST_ALONE) else []
            if any(num_letters(word) >= ONE_EDIT for word in words):  # in some scripts a character is a word
                core = one[one.index(words[0]) : one.rindex(words[-1]) + len(words[-1])]
                self._misspelled[one] = core.translate(TYPESET), words
        known = dict.fromkeys((word for _, words in self._misspelled.values() for word in words), 0.0)
        self._speller = Spelling(known, ONE_EDIT, TWO_EDITS)
        self._common = common_words() if self._misspelled and spelling_rules > 2 else frozenset()

    def names_in(self, texts: Sequence[str]) -> list[list[str]]:
        """The people whom each text names, by the spelling of `names` and in its order.

        Raises:
            TypeError: if a text is no string.
        """
        return [self._found(text) for text in checked_texts(texts)]

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The number of different people whom each text names: float64 (texts,)."""
        return np.array([len(found) for found in self.names_in(texts)], dtype=np.float64)

    def check_savable(self) -> None:
        """Raise if it has another threshold than a saved one, which flags whoever names one person."""
        super().check_savable()
        if self.threshold != NameGate.threshold:
            raise ValueError(
                f"threshold is {self.threshold!r}, and a NameGate is saved with {NameGate.threshold} alone: assign it "
                "before, or pass a function of gate.scores as the gate, which is not saved."
            )

    def settings(self) -> dict[str, Any]:
        """The names, their aliases, and how they are read."""
        read = spelling_settings(self.spelling or self._pieces is not None, self.spelling_rules)
        return {"names": self.names, "aliases": self.aliases, **read, "spelling": self.spelling}

    @classmethod
    def restored(cls, saved: SavedGate, report: GateReport | None, model: Any, tokenizer: Any) -> NameGate:
        """The gate of a saved folder; `model` and `tokenizer` are not used.

        Raises:
            ValueError: if a field is damaged.
        """
        spelling, rules = read_spelling(saved), read_rules(saved)
        saved.check(
            {
                "names": (is_texts, "a list of texts"),
                "aliases": (
                    lambda value: isinstance(value, dict) and all(map(is_texts, value.values())),
                    "an object of lists of texts by name",
                ),
                "threshold": (lambda value: value == cls.threshold, f"{cls.threshold}"),
            }
        )
        try:
            gate = cls(saved.fields["names"], saved.fields["aliases"], spelling, rules)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{saved.path}: {error}") from error
        gate.report = report
        return gate

    def _found(self, text: str) -> list[str]:
        found = self._finder.find(text)
        read, words = without_disguises(text)
        readings = {text.translate(TYPESET), read.translate(TYPESET)}
        if not text.isascii() or readings != {text}:
            found = found.union(*map(self._finder.find, map(compatible, {text, read, *readings})))
        if self._pieces is not None:
            corrected = readings.union(self._pieces.corrected(list(readings)))
            if self.spelling_rules > 3:  # and with their markup: "<jane-doe@example.com>" looks like a tag
                corrected = corrected.union(map(without_markup, corrected))
            others = list(map(self._without_signs, corrected))
            found = found.union(*map(self._finder.find, map(compatible, {*chain.from_iterable(others)} - readings)))
            readings = {spaced for spaced, *_ in others}
        if self._misspelled:
            found = found.union(*map(self._misspelled_in, readings))
        owners = {self._owners[one] for one in found}
        owners |= {owner for word in map(compatible, words) for owner in self._in_joined(word)}
        return [name for name in self.names if name in owners] if owners else []

    def _without_signs(self, text: str) -> list[str]:
        """Readings of a text without the signs in it; first the one that keeps apostrophes, as of *O'Neill*."""
        spaced = without_signs_within(text)
        return spaced if self.spelling_rules < 4 else spaced + without_signs_within(text, apostrophes=True)

    def _misspelled_in(self, text: str) -> set[str]:
        """Names whose words, some of them misspelled, stand in a text with the name's own signs between them.

        Each name is read by its own words: *Jon Smith* may be John Smith, whoever else is called Joan or Jon.
        """
        plain = compatible(text)
        words = list(SPELLED.finditer(plain))
        near: dict[str, list[str]] = {}
        places: dict[str, set[int]] = {}
        for i, word in enumerate(map(re.Match.group, words)):
            if word not in near:
                itself = [word] if word in self._speller.words else []
                near[word] = itself + self._speller.near(word)
            for known in near[word]:
                places.setdefault(known, set()).add(i)

        def stands(core: str, parts: list[str], start: int) -> bool:
            found = words[start : start + len(parts)]
            right = english_words() if len(parts) == 1 else self._common
            if any(word.group() != part and word.group() in right for word, part in zip(found, parts, strict=True)):
                return False
            between = [plain[one.end() : other.start()] for one, other in pairwise(found)]
            return normalized_name("".join(chain(*zip(parts, [*between, ""], strict=True)))) == core

        return {
            one
            for one, (core, parts) in self._misspelled.items()
            if any(
                stands(core, parts, start)
                for start in set.intersection(*({i - j for i in places.get(word, ())} for j, word in enumerate(parts)))
            )
        }

    def _in_joined(self, word: str) -> list[str]:
        """The people named in letters that stood apart: `"J a n e D o e"` is read as one word, with its neighbors."""
        return [name for one, name in self._joined if one == word or (len(one) >= LEAST_IN_JOINED and one in word)]

    def __repr__(self) -> str:
        return f"NameGate({listed(self.names, SHOWN_NAMES)})"


def _key(spelling: str) -> str:
    if not (key := normalized_name(compatible(spelling))):
        raise ValueError(f"the name {spelling!r} has no visible character; drop it.")
    return key
