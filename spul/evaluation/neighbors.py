"""Neighbors: rows near the forgotten ones, on which over-unlearning shows first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from ..data.checks import checked_column, checked_names
from ..data.clusters import TFIDF, TextClustering
from ..data.recognizers import NameFinder, recognize
from ..data.rows import SHOWN


def name_neighbors(
    candidates: Dataset,
    names: Sequence[str],
    words: Sequence[str] | None = None,
    recognizer: Callable[[Sequence[str]], list[list[str]]] | None = None,
    text_field: str = "text",
) -> Dataset:
    """Rows that name another person with the surname of a forgotten one.

    Whole words count, in any letter case. Rows that hold one of `names` in full are skipped. Without a recognizer a
    surname alone counts, though it may mean the forgotten person or nobody; with one, only recognized names count, and
    only those that are not part of a forgotten name.

    Args:
        candidates: retain or unseen rows, never forget rows.
        names: the forgotten people's full names; a name of one word stands for everybody who has it.
        words: the shared words; by default the last word of each name. `[word for name in names for word in
            name.split()]` adds first names.
        recognizer: returns the names in each text, as for `split_by_entity`.
        text_field: the column of texts.

    Returns:
        The neighbors, in the order of `candidates`, with all columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if the column is missing, or there is no neighbor.

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
    indices = [i for i, text in enumerate(texts) if near[i] and not forgotten.find(text)]
    if not indices:
        raise ValueError(
            f"none of {len(texts)} candidates names somebody else with one of the words {words[:SHOWN]}: {sum(near)} "
            f"do, each together with one of the names {names[:SHOWN]} in full. Pass full names (a name of one word "
            "leaves nobody else), more candidates, or other words=."
        )
    return candidates.select(indices)


def topic_neighbors(forget: Dataset, candidates: Dataset, num: int, text_field: str = "text") -> Dataset:
    """Rows closest to a forget row by TF-IDF cosine.

    English stop words do not count. Rows whose text equals that of a forget row are skipped; parts of one, such as the
    phrases of SST-2, are not.

    Args:
        forget: the forget rows.
        candidates: retain or unseen rows, never forget rows.
        num: number of neighbors.
        text_field: the column of texts.

    Returns:
        `num` rows of `candidates`, the nearest first, with all their columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if the column is missing, or fewer than `num` candidates share a word with a forget row.

    Source: domain neighbors, Chang and Lee, *Which Retain Set Matters for LLM Unlearning?*,
    https://arxiv.org/abs/2502.11441; TF-IDF as in scikit-learn
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    if num < 1:
        raise ValueError(f"num={num}; expected at least 1.")
    forgotten, texts, indices = _others(forget, candidates, text_field)
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
    return candidates.select([indices[i] for i in distances.argsort(kind="stable")[:num]])


def cluster_neighbors(
    forget: Dataset, candidates: Dataset, clustering: TextClustering, text_field: str = "text"
) -> Dataset:
    """Rows whose text lies in a cluster of forget rows.

    Rows whose text equals that of a forget row are skipped. If the forget rows are whole clusters, pass unseen rows:
    no retain row lies in them.

    Args:
        forget: the forget rows.
        candidates: retain or unseen rows, never forget rows.
        clustering: assigns the texts.
        text_field: the column of texts.

    Returns:
        The neighbors, in the order of `candidates`, with all columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if the column is missing, there is no neighbor, or forget rows lie in every cluster, so that all
            rows would be neighbors.
    """
    if not isinstance(clustering, TextClustering):
        raise TypeError(f"clustering is a {type(clustering).__name__}; expected TextClustering.fit(texts, ...).")
    forgotten, texts, indices = _others(forget, candidates, text_field)
    clusters, num_clusters = np.unique(clustering.assign(forgotten)), len(clustering.centers)
    if len(clusters) == num_clusters:
        raise ValueError(
            f"the {len(forgotten)} forget rows lie in all {num_clusters} clusters, so that every row is a neighbor. "
            "Fit more clusters, or use topic_neighbors."
        )
    near = np.isin(clustering.assign(texts), clusters)
    if not near.any():
        raise ValueError(
            f"none of {len(texts)} candidates lies in the forget rows' clusters, {clusters.tolist()} of 0 to "
            f"{num_clusters - 1}. Pass unseen rows (the retain rows of split_by_cluster lie elsewhere), or fit fewer "
            "clusters."
        )
    return candidates.select([i for i, is_near in zip(indices, near, strict=True) if is_near])


def _others(forget: Dataset, candidates: Dataset, text_field: str) -> tuple[list[str], list[str], list[int]]:
    """Texts of the forget rows, texts of the candidates that equal none of them, and these candidates' indices."""
    forgotten = checked_column(forget, text_field, "forget")
    texts = checked_column(candidates, text_field, "candidates")
    known = set(forgotten)
    indices = [i for i, text in enumerate(texts) if text not in known]
    if not indices:
        raise ValueError(
            f"each of {len(texts)} candidates has the text of a forget row; pass retain or unseen rows as candidates."
        )
    return forgotten, [texts[i] for i in indices], indices
