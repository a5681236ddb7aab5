"""TF-IDF of n-grams: those that a gate by wording is fit on, and those that it knows, counted word by word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from .disguises import compatible

# Character n-grams within words (with a space at either end), and words with pairs of words.
N_GRAMS: dict[str, dict[str, Any]] = {
    "chars": {"analyzer": "char_wb", "ngram_range": (2, 4)},
    "words": {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
}
# Shared by all vectorizers. Lower case and compatible characters, so that full-width letters are no way around.
TFIDF: dict[str, Any] = {"preprocessor": compatible, "sublinear_tf": True, "dtype": np.float64}
# Texts whose n-grams are in memory together.
TEXTS_AT_ONCE = 4096


class KnownNGrams:
    """TF-IDF of known n-grams, to the last bit as scikit-learn's `TfidfVectorizer` computes it.

    The windows of a text have their words in common, and the characters of each word are counted once.

    Args:
        vocabulary: n-grams, `"chars"` and `"words"`.
        idf: (n-grams,), characters first.
    """

    def __init__(self, vocabulary: dict[str, list[str]], idf: np.ndarray) -> None:
        self._index, self._analyze, self._tfidf = {}, {}, {}
        start = 0
        for name, terms in vocabulary.items():
            self._index[name] = {term: i for i, term in enumerate(terms)}
            self._analyze[name] = CountVectorizer(**N_GRAMS[name], preprocessor=str).build_analyzer()
            self._tfidf[name] = TfidfTransformer(sublinear_tf=TFIDF["sublinear_tf"])
            self._tfidf[name].idf_ = idf[start : start + len(terms)]
            start += len(terms)

    def weighted(self, texts: Sequence[str], weights: np.ndarray) -> np.ndarray:
        """The sum of each text's TF-IDF, weighted: float64 (texts,).

        Args:
            texts: texts.
            weights: (n-grams,).
        """
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate([np.zeros(0), *(self._features(part) @ weights for part in parts)])

    def _features(self, texts: Sequence[str]) -> csr_matrix:
        plain = [compatible(text) for text in texts]
        split = [text.split() for text in plain]
        numbers = {word: i for i, word in enumerate(dict.fromkeys(chain.from_iterable(split)))}
        of_words = self._counts("chars", list(numbers))
        counts = {
            "chars": _rows([[numbers[word] for word in words] for words in split], len(numbers)) @ of_words,
            "words": self._counts("words", plain),
        }
        for each in counts.values():
            each.sort_indices()
        return hstack([tfidf.transform(counts[name], copy=False) for name, tfidf in self._tfidf.items()], format="csr")

    def _counts(self, name: str, texts: Sequence[str]) -> csr_matrix:
        """Counts of each n-gram in each text: (texts, n-grams)."""
        index, analyze = self._index[name], self._analyze[name]
        found = [[index[each] for each in analyze(text) if each in index] for text in texts]
        return _rows(found, len(index))


def _rows(columns: Sequence[Sequence[int]], width: int) -> csr_matrix:
    """Counts of each column in each row: (rows, width), float64."""
    starts = [0, *accumulate(map(len, columns))]
    flat = np.fromiter(chain.from_iterable(columns), dtype=np.int32, count=starts[-1])
    found = csr_matrix((np.ones(len(flat)), flat, starts), shape=(len(columns), width))
    found.sum_duplicates()
    return found
