"""TF-IDF of known n-grams, against that of scikit-learn's own vectorizers, to the last bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
from gated_texts import forget_texts, retain_texts
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer

from spul.gates import ngrams
from spul.gates.ngrams import N_GRAMS, TFIDF, KnownNGrams
from spul.gates.windows import passages

TEXTS = forget_texts() + retain_texts()


@pytest.fixture(scope="module")
def vectorizers():
    return [TfidfVectorizer(**N_GRAMS[name], **TFIDF, min_df=2).fit(TEXTS) for name in N_GRAMS]


@pytest.mark.parametrize("at_once", [5, 10_000])
def test_weighted_sums_are_those_of_the_vectorizers(vectorizers, at_once, monkeypatch):
    monkeypatch.setattr(ngrams, "TEXTS_AT_ONCE", at_once)
    vocabulary = {name: each.get_feature_names_out().tolist() for name, each in zip(N_GRAMS, vectorizers, strict=True)}
    idf = np.concatenate([each.idf_ for each in vectorizers])
    weights = np.random.default_rng(0).normal(size=len(idf))
    draws = random.Random(0)
    odd = ["".join(draws.choices("jane doe\n\u00a0\u3000\u0434\uff2a\u0336_'-9", k=60)) for _ in range(40)]
    texts = [*passages(" ".join(retain_texts(30, seed=7)), 96, 48), *TEXTS, *odd, "", " ", "?!", "x" * 300, "a a a a"]
    expected = hstack([each.transform(texts) for each in vectorizers], format="csr") @ weights
    found = KnownNGrams(vocabulary, idf).weighted(texts, weights)
    assert np.array_equal(found, expected)
    assert len(set(found.tolist())) > 100
    assert KnownNGrams(vocabulary, idf).weighted([], weights).shape == (0,)
