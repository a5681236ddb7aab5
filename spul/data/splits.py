"""Splits of a data set into forget and retain rows: by the people named, by cluster, by source, by a predicate."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..records.messages import listed
from .checks import check_rows, checked_column, checked_list, checked_names, checked_text_batches, checked_texts
from .clusters import TextClustering
from .recognizers import NameFinder, normalized_name, recognize
from .rows import SHOWN, column_values, read_rows, rows_at, shortened

logger = logging.getLogger(__name__)


# Names, clusters or sources that a message or a report shows.
SHOWN_GROUPS = 12


@dataclass(frozen=True)
class SplitReport:
    """Report of a split, to read before training on it.

    Attributes:
        rule: the rule and its settings, on one line.
        num_forget: number of forget rows.
        num_retain: number of retain rows.
        groups: number of rows that matched each forgotten name, cluster or source, in descending order; a row that
            names two people counts for both. Empty for a predicate.
        unmatched: names, clusters or sources that matched no row.
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
            lines.append(f"found nowhere: {listed(self.unmatched, SHOWN_GROUPS)}")
        for group, texts in self.examples.items():
            lines += [f"{group}: {shortened(' '.join(text.split()), 100)}" for text in texts]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Split:
    """Forget and retain rows of a data set, and the report of the split."""

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
    """Split rows by the people they name, as the SPUL paper does with SST-2.

    A name matches as whole words, in any letter case and with any white space between its words; *chan* also matches
    *Jackie Chan*. With `names` alone the whole text is searched; with a recognizer, only the names that it found in
    the text, so the verb *bond* does not match. With a recognizer alone, the names are those that it found.

    Args:
        rows: data set with a column of texts.
        names: people to forget.
        recognizer: `TransformersRecognizer`, `SpacyRecognizer`, or any function from texts to the names in each.
        text_field: column of texts.
        num_names: with a recognizer alone, the number of names to draw from those that it found; None takes all.
        seed: seed of that draw.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if neither names nor a recognizer is given, no name is found, or a set would be empty.

    Source: Bhaila, Van and Wu, *Soft Prompting for Unlearning in Large Language Models*, https://arxiv.org/abs/2406.12038
    """
    check_rows(rows, (text_field,), argument="text_field")
    if names is None and recognizer is None:
        raise ValueError("split_by_entity needs names=, a recognizer=, or both.")
    if num_names is not None and (names is not None or num_names < 1):
        raise ValueError(
            f"num_names={num_names} is the number of names to draw from those that a recognizer found; expected at "
            "least 1, and no names=."
        )
    if names is not None:
        names = checked_names("names", names)
    matches: Iterable[set[str]]
    if recognizer is None:
        assert names is not None
        rule = f"rows whose column {text_field!r} names one of {len(names)} names"
        finder = NameFinder(names)
        matches = (finder.find(text) for texts in checked_text_batches(rows, text_field) for text in texts)
    else:
        found = recognize(recognizer, checked_texts(column_values(rows, text_field)))
        if names is None:
            names, which = _found_names(found, num_names, seed)
        else:
            which = f"one of {len(names)} names"
        name_of_recognizer = recognizer.__name__ if hasattr(recognizer, "__name__") else repr(recognizer)
        rule = f"rows in whose column {text_field!r} {name_of_recognizer} found {which}"
        finder = NameFinder(names)
        matches = (set().union(*map(finder.find, spans)) for spans in found)
    return _split(rows, matches, list(finder.spelled.values()), rule, text_field, "names")


def _found_names(found: Sequence[Sequence[str]], num: int | None, seed: int) -> tuple[list[str], str]:
    """The different names of all texts, or some that are drawn from them, and what a rule says of them."""
    different = {normalized_name(name, typeset=True): name for spans in reversed(found) for name in spans}
    names = [name for _, name in sorted(different.items())]
    if num is None:
        return names, f"a name, of {len(names)} in all"
    if num > len(names):
        raise ValueError(f"num_names={num}, but the recognizer found {len(names)} different names; lower it.")
    drawn = random.Random(seed).sample(names, num)
    return drawn, f"one of {num} names, drawn from the {len(names)} it found (seed {seed})"


def split_by_cluster(
    rows: Dataset, clustering: TextClustering, forget_clusters: Sequence[int], text_field: str = "text"
) -> Split:
    """Split rows by the cluster of their text, as the SPUL paper does with Yelp.

    Args:
        rows: data set with a column of texts, clustered before or not.
        clustering: assigns each text to a cluster.
        forget_clusters: indices of the clusters to forget, from 0.
        text_field: column of texts.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no such column or cluster, or a set would be empty.
    """
    texts = checked_column(rows, text_field)
    if not isinstance(clustering, TextClustering):
        raise TypeError(f"clustering is a {type(clustering).__name__}; expected TextClustering.fit(texts, ...).")
    wanted = checked_list("forget_clusters", forget_clusters)
    num_clusters = len(clustering.centers)
    if bad := [index for index in wanted if index not in range(num_clusters)]:
        raise ValueError(f"forget_clusters holds {bad[0]!r}; expected clusters from 0 to {num_clusters - 1}.")
    names = [str(int(index)) for index in wanted]
    groups = {name: (name,) for name in names}
    matches = (groups.get(str(index), ()) for index in clustering.assign(texts))
    rule = (
        f"rows whose column {text_field!r} falls into one of the clusters {', '.join(names)} of {num_clusters} "
        f"({clustering.embedder})"
    )
    return _split(rows, matches, names, rule, text_field, "clusters")


def split_by_source(rows: Dataset, forget_sources: Sequence[Any], column: str = "source") -> Split:
    """Split rows by their source, a column such as the author, the customer or the document.

    Args:
        rows: data set with that column.
        forget_sources: values of the column to forget.
        column: the column.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no such column, none of the values is in it, or a set would be empty.
    """
    check_rows(rows, (column,), argument="column")
    wanted = checked_list("forget_sources", forget_sources)
    names = [str(value) for value in wanted]
    values = column_values(rows, column)
    matches = _matches(values, wanted, names)
    if not any(matches):
        found = sorted(set(map(repr, values)))
        raise ValueError(
            f"none of the sources {listed([*map(repr, wanted)], SHOWN_GROUPS)} is in the column {column!r}, which has "
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
    """Split rows by a function of yours, true for forget rows.

    Args:
        rows: data set.
        predicate: function of a row, a mapping from column to value.
        description: description of the rows it accepts, for the report.
        text_field: column of texts, for the report.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no such column, or a set would be empty.
    """
    check_rows(rows, (text_field,), argument="text_field")
    if not callable(predicate):
        raise TypeError(f"predicate is a {type(predicate).__name__}; expected a function of a row.")
    return _split(
        rows, (("",) if predicate(row) else () for row in read_rows(rows)), None, description, text_field, "rows"
    )


def subsample_forget(split: Split, fraction: float, seed: int = 0) -> Split:
    """Draw a random share of the forget rows; the others are in neither set.

    The report keeps `groups` and `unmatched` of the whole forget set, and those forget examples drawn.

    Args:
        split: split to draw from.
        fraction: share of the forget rows, above 0 and at most 1.
        seed: seed of the draw.

    Raises:
        TypeError: if `split` is no `Split`.
        ValueError: if `fraction` is out of range, or so low that no row remains.
    """
    _check_split(split)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}; expected a share above 0 and at most 1.")
    num_rows = len(split.forget)
    drawn = random.Random(seed).sample(range(num_rows), round(num_rows * fraction))
    if not drawn:
        raise ValueError(f"fraction={fraction!r} of {num_rows} forget rows leaves none; raise it.")
    forget = split.forget.select(sorted(drawn))
    rule = (
        f"{split.report.rule}; of the {num_rows} rows matched, a random {len(drawn)} kept (fraction {fraction}, seed "
        f"{seed}) and {num_rows - len(drawn)} excluded from both sets"
    )
    shown = [text for i, text in enumerate(split.report.examples["forget"]) if i in drawn]
    examples = {**split.report.examples, "forget": shown}
    report = dataclasses.replace(split.report, rule=rule, num_forget=len(drawn), examples=examples)
    return Split(forget, split.retain, report)


def train_test(split: Split, test_fraction: float = 0.3, seed: int = 0) -> dict[str, Dataset]:
    """Shuffle both sets of a split and divide each into a training and a test part.

    Rows are drawn one by one: a text that is repeated can end up in both parts.

    Args:
        split: split to divide.
        test_fraction: share of the test part of each set, above 0 and below 1, rounded down to whole rows.
        seed: seed of the shuffles.

    Returns:
        `train_retain`, `train_forget`, `test_retain` and `test_forget`.

    Raises:
        TypeError: if `split` is no `Split`.
        ValueError: if `test_fraction` is out of range, or a part would be empty.
    """
    _check_split(split)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction!r}; expected a share above 0 and below 1.")
    parts: dict[str, dict[str, Dataset]] = {"train": {}, "test": {}}
    for group, rows in (("retain", split.retain), ("forget", split.forget)):
        # 100 * 0.29 is a little below 29 in binary floats.
        num_test = math.floor(len(rows) * test_fraction + 1e-9)
        if num_test in (0, len(rows)):
            raise ValueError(
                f"test_fraction={test_fraction} divides {len(rows)} {group} row(s) so that a part is empty; expected "
                "at least one row in each."
            )
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        parts["test"][group] = rows.select(order[:num_test])
        parts["train"][group] = rows.select(order[num_test:])
    return {f"{part}_{group}": rows for part, groups in parts.items() for group, rows in groups.items()}


def _split(
    rows: Dataset,
    matches: Iterable[Collection[str]],
    wanted: list[str] | None,
    rule: str,
    text_field: str | None,
    kind: str,
) -> Split:
    """The split and its report, from the names, clusters or sources that each row matched."""
    counts: Counter[str] = Counter()
    is_forget = np.zeros(len(rows), dtype=bool)
    for i, names in enumerate(matches):
        if names:
            counts.update(names)
            is_forget[i] = True
    unmatched = [name for name in wanted or () if not counts[name]]
    if wanted and len(unmatched) == len(wanted):
        shown = listed([*map(repr, unmatched)], SHOWN_GROUPS)
        raise ValueError(
            f"none of the {kind} asked for is found in {len(rows)} rows: {shown}. Expected at least one; check their "
            "spelling and the column."
        )
    if unmatched:
        logger.warning(
            "%d of the %d %s are found nowhere: %s",
            len(unmatched),
            len(wanted or ()),
            kind,
            listed(unmatched, SHOWN_GROUPS),
        )
    forget, retain = (rows.select(np.flatnonzero(is_forget == group)) for group in (True, False))
    for group, part in (("forget", forget), ("retain", retain)):
        if len(part) == 0:
            raise ValueError(
                f"the {group} set is empty: {len(forget)} of {len(rows)} rows are {rule}. Expected a row in each set."
            )
    report = SplitReport(
        rule=rule,
        num_forget=len(forget),
        num_retain=len(retain),
        groups=dict(counts.most_common()) if wanted else {},
        unmatched=unmatched,
        examples={"forget": _examples(forget, text_field), "retain": _examples(retain, text_field)},
    )
    return Split(forget, retain, report)


def _matches(values: Sequence[Any], wanted: Sequence[Any], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The name of each value that is wanted."""
    try:
        groups = {value: (name,) for value, name in zip(wanted, names, strict=True)}
        return [groups.get(value, ()) for value in values]
    except TypeError:  # lists or dicts, which a dict does not look up
        return [(names[wanted.index(value)],) if value in wanted else () for value in values]


def _check_split(split: Any) -> None:
    if not isinstance(split, Split):
        raise TypeError(f"split is a {type(split).__name__}; expected a Split, such as that of split_by_entity.")


def _examples(rows: Dataset, text_field: str | None) -> list[str]:
    shown = rows_at(rows, range(min(SHOWN, len(rows))))
    return [str(row if text_field is None else row[text_field]) for row in shown]
