"""What else was lost: rows near the forgotten ones, and unrelated running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from ..data.checks import checked_column, checked_names
from ..data.clusters import TFIDF, TextClustering
from ..data.recognizers import NameFinder, recognize

logger = logging.getLogger(__name__)


SHOWN = 5


# ---- neighbors ----


def name_neighbors(
    candidates: Dataset,
    names: Sequence[str],
    words: Sequence[str] | None = None,
    recognizer: Callable[[Sequence[str]], list[list[str]]] | None = None,
    text_field: str = "text",
) -> Dataset:
    """Rows that name somebody who shares a surname with a forgotten person, and not that person.

    Whole words count, in any letter case. Rows that hold one of `names` in full are left out. Without a recognizer
    a surname by itself counts, though it may mean the forgotten person or nobody; with one, only names that it found
    count, and only those that are more than a part of a forgotten name.

    Args:
        candidates: retain or unseen rows, never forget rows.
        names: the forgotten people's full names; a name of one word stands for everybody who has it.
        words: what is shared; the last word of each name unless given. `[word for name in names for word in
            name.split()]` takes first names too.
        recognizer: gives the names in each text, as for `split_by_entity`.
        text_field: the column of texts.

    Returns:
        These rows, in their order, with all their columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column, or no neighbor.

    Source: entity neighbors, Chang and Lee, *Which Retain Set Matters for LLM Unlearning?*,
    https://arxiv.org/abs/2502.11441
    """
    texts = checked_column(candidates, text_field, "candidates")
    names = checked_names("names", names)
    words = [name.split()[-1] for name in names] if words is None else checked_names("words", words)
    forgotten, shared = NameFinder(names), NameFinder(words)

    def is_somebody_else(found: str) -> bool:
        part = NameFinder([found])
        return bool(shared.find(found)) and not any(part.find(name) for name in names)

    if recognizer is None:
        near = [bool(shared.find(text)) for text in texts]
    else:
        near = [any(map(is_somebody_else, found)) for found in recognize(recognizer, texts)]
    places = [i for i, text in enumerate(texts) if near[i] and not forgotten.find(text)]
    if not places:
        raise ValueError(
            f"none of {len(texts)} candidates names somebody else with one of the words {words[:SHOWN]}: {sum(near)} "
            f"do, each together with one of the names {names[:SHOWN]} in full. Pass full names (a name of one word "
            "leaves nobody else), more candidates, or other words=."
        )
    return candidates.select(places)


def topic_neighbors(forget: Dataset, candidates: Dataset, num: int, text_field: str = "text") -> Dataset:
    """The rows whose words are most like those of some forget row: TF-IDF cosine to the nearest forget row.

    English stop words do not count. Rows whose text is that of a forget row are left out; parts of one, such as the
    phrases of SST-2, are not.

    Args:
        forget: the forget rows.
        candidates: retain or unseen rows, never forget rows.
        num: how many rows to take.
        text_field: the column of texts.

    Returns:
        `num` rows of `candidates`, the nearest first, with all their columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column, or fewer than `num` candidates share a word with a forget row.

    Source: domain neighbors, Chang and Lee, *Which Retain Set Matters for LLM Unlearning?*,
    https://arxiv.org/abs/2502.11441; TF-IDF as in scikit-learn
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    if num < 1:
        raise ValueError(f"num={num}; expected at least 1.")
    forgotten, texts, places = _others(forget, candidates, text_field)
    vectorizer = TfidfVectorizer(**TFIDF)
    try:
        vectorizer.fit(forgotten + texts)
    except ValueError as error:
        raise ValueError(
            f"no words to compare by in {len(forgotten)} forget rows and {len(texts)} candidates (stop words and "
            f"single letters do not count); the first is {forgotten[0][:80]!r}."
        ) from error
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectorizer.transform(forgotten))
    distances = nearest.kneighbors(vectorizer.transform(texts))[0][:, 0]
    if (alike := int((distances < 1).sum())) < num:
        raise ValueError(
            f"num={num}, but only {alike} of {len(texts)} candidates (those that equal no forget row) share a word "
            "with a forget row. Lower num, or pass more candidates."
        )
    return candidates.select([places[i] for i in distances.argsort(kind="stable")[:num]])


def cluster_neighbors(
    forget: Dataset, candidates: Dataset, clustering: TextClustering, text_field: str = "text"
) -> Dataset:
    """Rows whose text falls into a cluster in which forget rows lie.

    Rows whose text is that of a forget row are left out. For forget rows that are whole clusters, pass unseen rows:
    no retain row lies with them.

    Args:
        forget: the forget rows.
        candidates: retain or unseen rows, never forget rows.
        clustering: assigns the texts.
        text_field: the column of texts.

    Returns:
        These rows, in their order, with all their columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column, no neighbor, or forget rows lie in every cluster, so that all rows
            would be neighbors.
    """
    if not isinstance(clustering, TextClustering):
        raise TypeError(f"clustering is a {type(clustering).__name__}; expected TextClustering.fit(texts, ...).")
    forgotten, texts, places = _others(forget, candidates, text_field)
    clusters, num_clusters = np.unique(clustering.assign(forgotten)), len(clustering.centers)
    if len(clusters) == num_clusters:
        raise ValueError(
            f"the {len(forgotten)} forget rows lie in all {num_clusters} clusters, so that every row is a neighbor. "
            "Fit more clusters, or take topic_neighbors."
        )
    near = np.isin(clustering.assign(texts), clusters)
    if not near.any():
        raise ValueError(
            f"none of {len(texts)} candidates lies in the forget rows' clusters, {clusters.tolist()} of 0 to "
            f"{num_clusters - 1}. Pass unseen rows (what split_by_cluster retains lies elsewhere), or fit fewer "
            "clusters."
        )
    return candidates.select([place for place, is_near in zip(places, near, strict=True) if is_near])


def _others(forget: Dataset, candidates: Dataset, text_field: str) -> tuple[list[str], list[str], list[int]]:
    """The forget rows' texts, those of the candidates that equal none of them, and these candidates' places."""
    forgotten = checked_column(forget, text_field, "forget")
    texts = checked_column(candidates, text_field, "candidates")
    known = set(forgotten)
    places = [i for i, text in enumerate(texts) if text not in known]
    if not places:
        raise ValueError(
            f"each of {len(texts)} candidates has the text of a forget row; pass retain or unseen rows as candidates."
        )
    return forgotten, [texts[i] for i in places], places
