"""What else was lost: rows near the forgotten ones, and unrelated running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..collator import ForgetRetainCollator
from ..data.clusters import TFIDF, TextClustering
from ..data.recognisers import checked_texts, recognise
from ..data.splits import NameFinder
from .likelihood import response_likelihoods

logger = logging.getLogger(__name__)

SHOWN = 5


# ---- neighbours ----


def name_neighbours(
    candidates: Dataset,
    names: Sequence[str],
    words: Sequence[str] | None = None,
    recogniser: Callable[[Sequence[str]], list[list[str]]] | None = None,
    text_field: str = "text",
) -> Dataset:
    """Rows that name somebody who shares a surname with a forgotten person, and not that person.

    Whole words count, in any letter case. Rows that hold one of `names` in full are left out. Without a recogniser
    a surname by itself counts, though it may mean the forgotten person or nobody; with one, only names that it found
    count, and only those that are more than a part of a forgotten name.

    Args:
        candidates: retain or unseen rows, never forget rows.
        names: the forgotten people's full names; a name of one word stands for everybody who has it.
        words: what is shared; the last word of each name unless given. `[word for name in names for word in
            name.split()]` takes first names too.
        recogniser: gives the names in each text, as for `split_by_entity`.
        text_field: the column of texts.

    Returns:
        These rows, in their order, with all their columns.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there is no such column, or no neighbour.

    Source: entity neighbours, Chang and Lee, *Which Retain Set Matters for LLM Unlearning?*,
    https://arxiv.org/abs/2502.11441
    """
    texts = _texts("candidates", candidates, text_field)
    names = _checked_names("names", names)
    words = [name.split()[-1] for name in names] if words is None else _checked_names("words", words)
    forgotten, shared = NameFinder(names), NameFinder(words)

    def is_somebody_else(found: str) -> bool:
        part = NameFinder([found])
        return bool(shared.find(found)) and not any(part.find(name) for name in names)

    if recogniser is None:
        near = [bool(shared.find(text)) for text in texts]
    else:
        near = [any(map(is_somebody_else, found)) for found in recognise(recogniser, texts)]
    places = [i for i, text in enumerate(texts) if near[i] and not forgotten.find(text)]
    if not places:
        raise ValueError(
            f"none of {len(texts)} candidates names somebody else with one of the words {words[:SHOWN]}: {sum(near)} "
            f"do, each together with one of the names {names[:SHOWN]} in full. Pass full names (a name of one word "
            "leaves nobody else), more candidates, or other words=."
        )
    return candidates.select(places)


def topic_neighbours(forget: Dataset, candidates: Dataset, num: int, text_field: str = "text") -> Dataset:
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

    Source: domain neighbours, Chang and Lee, *Which Retain Set Matters for LLM Unlearning?*,
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


def cluster_neighbours(
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
        ValueError: if there is no such column, no neighbour, or forget rows lie in every cluster, so that all rows
            would be neighbours.
    """
    if not isinstance(clustering, TextClustering):
        raise TypeError(f"clustering is a {type(clustering).__name__}; expected TextClustering.fit(texts, ...).")
    forgotten, texts, places = _others(forget, candidates, text_field)
    clusters, num_clusters = np.unique(clustering.assign(forgotten)), len(clustering.centres)
    if len(clusters) == num_clusters:
        raise ValueError(
            f"the {len(forgotten)} forget rows lie in all {num_clusters} clusters, so that every row is a neighbour. "
            "Fit more clusters, or take topic_neighbours."
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
    forgotten, texts = _texts("forget", forget, text_field), _texts("candidates", candidates, text_field)
    known = set(forgotten)
    places = [i for i, text in enumerate(texts) if text not in known]
    if not places:
        raise ValueError(
            f"each of {len(texts)} candidates has the text of a forget row; pass retain or unseen rows as candidates."
        )
    return forgotten, [texts[i] for i in places], places


def _texts(argument: str, rows: Dataset, text_field: str) -> list[str]:
    if not isinstance(rows, Dataset):
        raise TypeError(f"{argument} is a {type(rows).__name__}; expected a datasets.Dataset: Dataset.from_list(...).")
    if text_field not in rows.column_names:
        raise ValueError(
            f"{argument} has no column text_field={text_field!r}; its columns are {rows.column_names}. Name the one "
            "that holds the texts."
        )
    if len(rows) == 0:
        raise ValueError(f"{argument} is empty; expected at least one row.")
    return checked_texts(rows[text_field])


def _checked_names(argument: str, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{argument} is {names!r}; expected a list: [{names!r}].")
    names = list(names)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{argument}={names!r}; expected one or more names as text.")
    return names


# ---- running text ----


class TextLosses(NamedTuple):
    """How surprised a model is by texts.

    Attributes:
        nats: (texts,), the negative log-likelihood of each text's predicted tokens, summed, in nats.
        num_tokens: (texts,), how many tokens that is: all but the first, or but the token that begins every sequence.
        num_cut: (texts,), how many tokens were beyond `max_length` and are not scored.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_cut: np.ndarray


def text_losses(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    batch_size: int = 32,
    progress: str | None = None,
) -> TextLosses:
    """The loss of running text, such as pages of an encyclopedia that have nothing to do with what was forgotten.

    Tokens are those of `tokenizer(text)`. The first one is never predicted, not from a prompt either, so that models
    with and without one are scored on the same tokens. A text of one token has nothing to predict: 0 nats, 0 tokens.

    Args:
        model: a causal LM, bare, under PEFT, a prompt or unlearning layers.
        texts: running text.
        tokenizer: the model's; it needs no pad token and is not changed.
        max_length: the most tokens of a text, without virtual tokens; what is beyond is cut off its end and counted.
        batch_size: texts per forward, whose logits take `batch_size * length * vocabulary` numbers: lower it for long
            texts.
        progress: a name to show a progress bar under; none unless given.

    Raises:
        TypeError: if the texts are not strings.
        ValueError: if there are none, none has a token to predict, `max_length` is below 2, or the model's logits are
            not numbers.
    """
    texts = checked_texts(texts)
    if not texts:
        raise ValueError("texts is empty; expected at least one text.")
    collator = ForgetRetainCollator(tokenizer, None, max_length)
    whole = tokenizer(texts, verbose=False)["input_ids"]  # what is too long is cut, and told, below
    num_cut = np.array([max(0, len(ids) - max_length) for ids in whole])
    if num_cut.any():
        message = "max_length=%d cuts %d of %d texts: %d of their tokens are not scored."
        logger.warning(message, max_length, np.count_nonzero(num_cut), len(texts), num_cut.sum())
    kept = [ids[:max_length] for ids in whole]
    num_tokens = np.array([max(0, len(ids) - 1) for ids in kept])
    places = np.flatnonzero(num_tokens)
    if not len(places):
        raise ValueError(
            f"none of {len(texts)} texts has a token to predict; expected texts of at least two tokens, such as "
            "paragraphs."
        )
    # The first token is what is given, the others are what is answered.
    rows = [{"input_ids": kept[i], "completion_mask": [0] + [1] * int(num_tokens[i])} for i in places]
    found = response_likelihoods(model, Dataset.from_list(rows), collator, batch_size, progress)
    nats = np.zeros(len(texts))
    nats[places] = [-likelihood.log_probs.sum(dtype=np.float64) for likelihood in found]
    return TextLosses(nats, num_tokens, num_cut)


def perplexity(losses: TextLosses) -> float:
    """`exp(nats / tokens)` over all texts together, 1 or more; infinite beyond what floats can hold.

    As low as before unlearning is best. Only models with the same tokens can be compared by it.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(losses.nats.sum() / losses.num_tokens.sum()))
