"""What is forgotten and what is kept: data sets divided by the people they name, by cluster, by source, by a rule."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .checks import check_rows, checked_column, checked_list, checked_names
from .clusters import TextClustering
from .recognizers import recognize
from .rows import SHOWN, listed, shortened

logger = logging.getLogger(__name__)


# Names, clusters or sources that a message or a report shows.
SHOWN_GROUPS = 12
TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class SplitReport:
    """What a split did, to be looked at before training on it.

    Attributes:
        rule: one line: what was done, with its settings.
        num_forget: rows to be forgotten.
        num_retain: rows to be kept.
        groups: forgotten name, cluster or source -> number of rows it matched, most first; a row that names two
            people counts for both. Empty for a predicate.
        unmatched: asked for, found nowhere.
        examples: `"forget"` and `"retain"`: up to 3 texts of each.
    """

    rule: str
    num_forget: int
    num_retain: int
    groups: dict[str, int]
    unmatched: list[str]
    examples: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.num_forget:,} rows to forget, {self.num_retain:,} to retain: {self.rule}"]
        if self.groups:
            counts = [f"{name} {count:,}" for name, count in self.groups.items()]
            lines.append(f"rows matched: {listed(counts, SHOWN_GROUPS)}")
        if self.unmatched:
            lines.append(f"found nowhere: {', '.join(self.unmatched)}")
        for group, texts in self.examples.items():
            lines += [f"{group}: {shortened(' '.join(text.split()), 100)}" for text in texts]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Split:
    """A data set divided in two, and the account of it."""

    forget: Dataset
    retain: Dataset
    report: SplitReport


def split_by_entity(
    rows: Dataset,
    names: Sequence[str] | None = None,
    recognizer: Callable[[Sequence[str]], list[list[str]]] | None = None,
    text_field: str = "text",
    num_names: int | None = None,
    seed: int = 0,
) -> Split:
    """Forget the rows that name certain people, as the SPUL paper does on SST-2.

    A name matches as whole words, in any letter case and with any white space between its words; *chan* also matches
    *Jackie Chan*. With `names` alone the whole text is searched; with a recognizer, only the names that it found in
    it, so that *bond* the verb is not a person. With a recognizer alone, the names are those that it found.

    Args:
        rows: a data set with a column of texts.
        names: whom to forget.
        recognizer: gives the names in each text: `SpacyRecognizer`, `TransformersRecognizer`, or a function of yours.
        text_field: the column of texts.
        num_names: with a recognizer alone, how many of the names that it found to draw; None for all.
        seed: seed of that draw.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if neither names nor a recognizer is given, nobody is found, or one set would be empty.

    Source: Bhaila, Van and Wu, *Soft Prompting for Unlearning in Large Language Models*, https://arxiv.org/abs/2406.12038
    """
    texts = checked_column(rows, text_field)
    if names is None and recognizer is None:
        raise ValueError("split_by_entity needs names=, a recognizer=, or both.")
    if num_names is not None and (names is not None or num_names < 1):
        raise ValueError(
            f"num_names={num_names} draws that many of the names that a recognizer found: expected at least 1, and no "
            "names=."
        )
    if names is not None:
        names = checked_names("names", names)
    if recognizer is None:
        assert names is not None
        searched = [[text] for text in texts]
        rule = f"rows whose column {text_field!r} names one of {len(names)} names"
    else:
        searched = recognize(recognizer, texts)
        who = recognizer.__name__ if hasattr(recognizer, "__name__") else repr(recognizer)
        rule = f"rows in whose column {text_field!r} {who} found"
        if names is None:
            found = sorted({_plain(name): name for spans in reversed(searched) for name in spans}.items())
            names = [name for _, name in found]
            if num_names is None:
                rule += f" a name, of {len(names)} in all"
            elif num_names > len(names):
                raise ValueError(f"num_names={num_names}, but the recognizer found {len(names)} different names.")
            else:
                rule += f" one of {num_names} names, drawn from the {len(names)} it found (seed {seed})"
                names = random.Random(seed).sample(names, num_names)
        else:
            rule += f" one of {len(names)} names"
    matcher = NameFinder(names)
    matches: list[set[str]] = [set().union(*(matcher.find(part) for part in parts)) for parts in searched]
    return _split(rows, matches, list(matcher.spelled.values()), rule, text_field, "names")


def split_by_cluster(
    rows: Dataset, clustering: TextClustering, forget_clusters: Sequence[int], text_field: str = "text"
) -> Split:
    """Forget the rows whose text falls into certain clusters, as the SPUL paper does on Yelp.

    Args:
        rows: a data set with a column of texts; those that were clustered, or others.
        clustering: assigns the texts.
        forget_clusters: numbers of clusters, from 0.
        text_field: the column of texts.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column or cluster, or one set would be empty.
    """
    texts = checked_column(rows, text_field)
    if not isinstance(clustering, TextClustering):
        raise TypeError(f"clustering is a {type(clustering).__name__}; expected TextClustering.fit(texts, ...).")
    asked = checked_list("forget_clusters", forget_clusters)
    num_clusters = len(clustering.centers)
    if bad := [number for number in asked if number not in range(num_clusters)]:
        raise ValueError(f"forget_clusters holds {bad[0]!r}; the clusters are 0 to {num_clusters - 1}.")
    names = [str(int(number)) for number in asked]
    matches = [{str(number)} & set(names) for number in clustering.assign(texts)]
    rule = (
        f"rows whose column {text_field!r} falls into one of the clusters {', '.join(names)} of {num_clusters} "
        f"({clustering.embedder})"
    )
    return _split(rows, matches, names, rule, text_field, "clusters")


def split_by_source(rows: Dataset, forget_sources: Sequence[Any], column: str = "source") -> Split:
    """Forget the rows that come from certain sources: a column has one of the values given.

    Args:
        rows: a data set with that column.
        forget_sources: values of the column.
        column: the column, such as an author, a customer or a document.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column, no such value in it, or one set would be empty.
    """
    check_rows(rows, (column,))
    asked = checked_list("forget_sources", forget_sources)
    names = [str(value) for value in asked]
    values = list(rows[column])
    matches = [{names[asked.index(value)]} if value in asked else set() for value in values]
    if not any(matches):
        found = sorted(set(map(repr, values)))
        raise ValueError(
            f"none of the sources {listed([*map(repr, asked)], SHOWN_GROUPS)} is in the column {column!r}, which has "
            f"{len(found)} different values: {listed(found, SHOWN_GROUPS)}."
        )
    rule = f"rows whose column {column!r} is one of {len(names)} values"
    return _split(rows, matches, names, rule, "text" if "text" in rows.column_names else None, f"values of {column!r}")


def split_by_predicate(
    rows: Dataset,
    predicate: Callable[[Mapping[str, Any]], bool],
    description: str = "rows that a predicate accepts",
    text_field: str = "text",
) -> Split:
    """Forget the rows for which a function of yours is true.

    Args:
        rows: a data set.
        predicate: is given each row, as a mapping from column to value.
        description: what the function accepts, for the report.
        text_field: the column of texts, for the report.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column, or one set would be empty.
    """
    check_rows(rows, (text_field,))
    if not callable(predicate):
        raise TypeError(f"predicate is a {type(predicate).__name__}; expected a function of a row.")
    return _split(rows, [{""} if predicate(row) else set() for row in rows], None, description, text_field, "rows")


def subsample_forget(split: Split, fraction: float, seed: int = 0) -> Split:
    """Keep a random share of the forget rows; those left out are in neither set.

    The report's `groups` and `unmatched` stay those of the whole forget set; its forget examples are those still in.

    Args:
        split: what to draw from.
        fraction: the share to keep, above 0 and at most 1.
        seed: seed of the draw.

    Raises:
        ValueError: if `fraction` is out of range, or so low that no row is left.
    """
    if not isinstance(split, Split):
        raise TypeError(f"split is a {type(split).__name__}; expected a Split, as split_by_entity and others give it.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}; expected a share above 0 and at most 1.")
    num_rows = len(split.forget)
    kept = random.Random(seed).sample(range(num_rows), round(num_rows * fraction))
    if not kept:
        raise ValueError(f"fraction={fraction!r} of {num_rows} forget rows leaves none; raise it.")
    forget = split.forget.select(sorted(kept))
    rule = (
        f"{split.report.rule}; of the {num_rows} rows matched, a random {len(kept)} kept (fraction {fraction}, seed "
        f"{seed}) and {num_rows - len(kept)} left out of both sets"
    )
    shown = [text for i, text in enumerate(split.report.examples["forget"]) if i in kept]
    examples = {**split.report.examples, "forget": shown}
    report = dataclasses.replace(split.report, rule=rule, num_forget=len(kept), examples=examples)
    return Split(forget, split.retain, report)


def train_test(split: Split, test_fraction: float = 0.3, seed: int = 0) -> dict[str, Dataset]:
    """Shuffle each of the two sets and cut it into a part to train on and a part to test on.

    Rows are drawn one by one: a text that stands in several rows can come to lie in both parts.

    Args:
        split: what to cut.
        test_fraction: the share of each set to test on, above 0 and below 1, rounded down to whole rows.
        seed: seed of the shuffles.

    Returns:
        `train_retain`, `train_forget`, `test_retain` and `test_forget`.

    Raises:
        ValueError: if `test_fraction` is out of range, or a part would be empty.
    """
    if not isinstance(split, Split):
        raise TypeError(f"split is a {type(split).__name__}; expected a Split, as split_by_entity and others give it.")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction!r}; expected a share above 0 and below 1.")
    parts: dict[str, dict[str, Dataset]] = {"train": {}, "test": {}}
    for group, rows in (("retain", split.retain), ("forget", split.forget)):
        # 100 * 0.29 is a little below 29 in binary floats.
        num_test = math.floor(len(rows) * test_fraction + 1e-9)
        if num_test in (0, len(rows)):
            raise ValueError(f"test_fraction={test_fraction} cuts {len(rows)} {group} row(s) so that a part is empty.")
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        parts["test"][group] = rows.select(order[:num_test])
        parts["train"][group] = rows.select(order[num_test:])
    return {f"{part}_{group}": rows for part, groups in parts.items() for group, rows in groups.items()}


class NameFinder:
    """Finds names in texts as whole words, whatever the letter case and the white space."""

    def __init__(self, names: Sequence[str]) -> None:
        self.spelled: dict[str, str] = {}
        self.by_first_token: dict[str, list[str]] = {}
        for name in names:
            plain = _plain(name)
            if plain not in self.spelled:
                self.spelled[plain] = name
                self.by_first_token.setdefault(TOKEN.findall(plain)[0], []).append(plain)

    def find(self, text: str) -> set[str]:
        """The names in a text, as they were spelled when they were given."""
        text = _plain(text)
        return {
            self.spelled[name]
            for token in TOKEN.finditer(text)
            for name in self.by_first_token.get(token.group(), ())
            if text.startswith(name, token.start())
            and not _in_word(text[: token.start()][-1:])
            and not _in_word(text[token.start() + len(name) :][:1])
        }


def _plain(text: str) -> str:
    """The text without what does not tell names apart: letter case, white space, how accents are encoded."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(text.split())


def _in_word(character: str) -> bool:
    # Vowel signs, as in Hindi, belong to words, but regular expressions do not count them among \w.
    return character.isalnum() or character == "_" or (character != "" and unicodedata.category(character)[0] == "M")


def _split(
    rows: Dataset,
    matches: Sequence[Collection[str]],
    asked: list[str] | None,
    rule: str,
    text_field: str | None,
    kind: str,
) -> Split:
    """The two sets and their report, from what each row matched of what was asked for."""
    counts = Counter(name for names in matches for name in names)
    unmatched = [name for name in asked or () if not counts[name]]
    if asked and len(unmatched) == len(asked):
        shown = listed([*map(repr, unmatched)], SHOWN_GROUPS)
        raise ValueError(f"none of the {kind} asked for is found in {len(rows)} rows: {shown}.")
    if unmatched:
        logger.warning("%d of the %d %s are found nowhere: %s", len(unmatched), len(asked or ()), kind, unmatched)
    forget = rows.select([i for i, names in enumerate(matches) if names])
    retain = rows.select([i for i, names in enumerate(matches) if not names])
    for group, part in (("forget", forget), ("retain", retain)):
        if len(part) == 0:
            raise ValueError(f"the {group} set is empty: {len(forget)} of {len(rows)} rows are {rule}.")
    report = SplitReport(
        rule=rule,
        num_forget=len(forget),
        num_retain=len(retain),
        groups=dict(counts.most_common()) if asked else {},
        unmatched=unmatched,
        examples={"forget": _examples(forget, text_field), "retain": _examples(retain, text_field)},
    )
    return Split(forget, retain, report)


def _examples(rows: Dataset, text_field: str | None) -> list[str]:
    return [str(row if text_field is None else row[text_field]) for row in rows.select(range(min(SHOWN, len(rows))))]
