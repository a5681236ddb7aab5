"""The gate by wording: TF-IDF of character and word n-grams, and logistic regression."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ..data.checks import checked_texts
from ..records.fields import is_count
from .files import SavedGate, is_texts
from .gate import Gate
from .ngrams import N_GRAMS, TFIDF, KnownNGrams
from .spelling import RULES, Spelling, check_spelling, read_rules, read_spelling, spelling_settings
from .thresholds import GateReport, checked_fit_texts, folds, report_of, threshold_for
from .windows import SHORTEST, highest_scores, is_window_sizes, window_sizes

logger = logging.getLogger(__name__)

WINDOWS = f"a number of characters, its half, a quarter and an eighth from {SHORTEST} on"
# Weak regularization: n-grams are many and each is rare.
STRENGTH = 10.0


class TextGate(Gate):
    """A gate that flags texts worded like the forget texts, made by `TextGate.fit`.

    The score is the log-odds of a logistic regression on TF-IDF of n-grams, the highest among the text and its
    windows, each as it is and with misspelled words as the nearest that the gate knows (`Spelling`). Saved, it holds
    n-grams of the texts that it was fit on, no texts.

    Args:
        vocabulary: n-grams, `"chars"` and `"words"`.
        idf: (n-grams,), characters first.
        weights: (n-grams,), of the regression.
        bias: of the regression.
        threshold: the lowest score that is flagged.
        windows: characters of a window, of each scale, as `window_sizes` gives them.
        spelling: whether texts are also read with misspelled words corrected.
        spelling_rules: the rules of `Spelling`.

    Raises:
        ValueError: if `windows` are others.
    """

    kind = "text"

    def __init__(
        self,
        vocabulary: dict[str, list[str]],
        idf: np.ndarray,
        weights: np.ndarray,
        bias: float,
        threshold: float,
        windows: Sequence[int],
        spelling: bool = True,
        spelling_rules: int = RULES,
    ) -> None:
        self.vocabulary, self.idf, self.weights, self.bias = vocabulary, idf, weights, bias
        self.threshold, self.windows = threshold, list(windows)
        self.spelling, self.spelling_rules = spelling, spelling_rules
        if not is_window_sizes(self.windows):  # a saved gate's are checked by the same
            raise ValueError(f"windows={windows!r}; expected {WINDOWS}, as window_sizes gives them.")
        self._n_grams = KnownNGrams(vocabulary, idf)

    @classmethod
    def fit(
        cls,
        forget_texts: Sequence[str],
        retain_texts: Sequence[str],
        recall: float = 0.99,
        seed: int = 0,
        paraphrases: Sequence[str] | None = None,
        min_texts: int = 2,
        spelling: bool = True,
    ) -> TextGate:
        """Fit the regression on all texts, and set the threshold for a recall on held-out ones.

        Held-out scores are those of regressions fit without the text's fold (5 folds; texts that differ in letter case
        and white space only share one), whole and in windows. The threshold is the highest that flags the recall asked
        for of held-out forget texts, and of the forget texts by the gate itself; the report is of the held-out scores.

        Args:
            forget_texts: texts that get the prompt, as requests are worded.
            retain_texts: texts that do not.
            recall: share of held-out forget texts to flag, above 0 and at most 1.
            seed: seed of the folds.
            paraphrases: rewordings of forget texts, only reported on: the share that the gate flags.
            min_texts: an n-gram in fewer texts is dropped, a repeated text counting each time. At 1, whole texts may
                be put together again from a saved gate's pairs of words.
            spelling: whether texts are also read with misspelled words as the nearest known ones; False where one
                character tells two requests apart, as in codes.

        Raises:
            TypeError: if a text is no string, or `spelling` no bool.
            ValueError: if a group has fewer than two different texts, a text to retain is in another, the recall is
                out of range or not reached without flagging everything, or no n-gram is in `min_texts` texts.
        """
        given = checked_fit_texts(forget_texts, retain_texts, paraphrases, recall)
        if not is_count(min_texts, least=1):
            raise ValueError(f"min_texts={min_texts!r}; expected an integer of at least 1.")
        check_spelling(spelling)
        texts, is_forget, windows = given.texts, given.is_forget, window_sizes(given.forget)
        fold = folds(given, seed)
        held_out = np.zeros(len(texts))
        for each in range(fold.max() + 1):
            outside = np.flatnonzero(fold != each)
            part = cls._fit([texts[i] for i in outside], is_forget[outside], min_texts, windows, spelling)
            inside = np.flatnonzero(fold == each)
            held_out[inside] = part.scores([texts[i] for i in inside])
        gate = cls._fit(texts, is_forget, min_texts, windows, spelling)
        fitted = gate.scores(given.forget)
        gate.threshold = threshold_for(held_out[is_forget], held_out[~is_forget], recall, fitted)
        flagged = held_out >= gate.threshold
        gate.report = report_of(
            flagged[is_forget],
            flagged[~is_forget],
            None if given.paraphrases is None else gate.flags(given.paraphrases),
            f"cross-validation, {fold.max() + 1} folds",
            recall,
        )
        return gate

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Log-odds of each text, the highest among it and its windows, however spelled: float64 (texts,)."""
        texts = checked_texts(texts)
        return highest_scores(self._scores, texts, *self.windows) if texts else np.zeros(0)

    def settings(self) -> dict[str, Any]:
        """The vocabulary, the sizes of windows, and whether spelling is corrected."""
        spelling = spelling_settings(self.spelling, self.spelling_rules)
        return {"windows": self.windows, **spelling, "vocabulary": self.vocabulary}

    def arrays(self) -> dict[str, np.ndarray]:
        """Inverse document frequencies, weights and bias."""
        return {"idf": self.idf, "weights": self.weights, "bias": np.array([self.bias])}

    @classmethod
    def restored(cls, saved: SavedGate, report: GateReport | None, model: Any, tokenizer: Any) -> TextGate:
        """The gate of a saved folder; `model` and `tokenizer` are not used.

        Raises:
            FileNotFoundError: if the arrays are missing.
            ValueError: if a field or an array is damaged.
        """
        spelling, rules = read_spelling(saved), read_rules(saved)
        saved.check(
            {
                "windows": (is_window_sizes, WINDOWS),
                "vocabulary": (_is_vocabulary, 'different texts as "chars" and as "words", in this order'),
            }
        )
        vocabulary = saved.fields["vocabulary"]
        num = sum(map(len, vocabulary.values()))
        arrays = saved.arrays({"idf": (num,), "weights": (num,), "bias": (1,)})
        bias = float(arrays["bias"][0])
        threshold, windows = saved.fields["threshold"], saved.fields["windows"]
        gate = cls(vocabulary, arrays["idf"], arrays["weights"], bias, threshold, windows, spelling, rules)
        gate.report = report
        return gate

    @classmethod
    def _fit(
        cls, texts: list[str], is_forget: np.ndarray, min_texts: int, windows: list[int], spelling: bool
    ) -> TextGate:
        """The gate of some texts, without a threshold."""
        vocabulary, idf, features = {}, [], []
        for name, settings in N_GRAMS.items():
            vectorizer = TfidfVectorizer(**settings, **TFIDF, min_df=min_texts)
            try:
                features.append(vectorizer.fit_transform(texts))
            except ValueError as error:
                raise ValueError(
                    f"no n-gram ({name}) is in {min_texts} of {len(texts)} texts ({error}); lower min_texts, or give "
                    "more texts."
                ) from error
            vocabulary[name] = vectorizer.get_feature_names_out().tolist()
            idf.append(vectorizer.idf_)
        model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
        model.fit(hstack(features, format="csr"), is_forget)
        bias = float(model.intercept_[0])
        return cls(vocabulary, np.concatenate(idf), model.coef_[0], bias, 0.0, windows, spelling)

    def _scores(self, texts: list[str]) -> np.ndarray:
        """Log-odds of texts, or of their corrected readings where these are higher."""
        scores = self._log_odds(texts)
        corrected = self._speller.corrected(texts) if self.spelling else texts
        if others := [i for i, text in enumerate(texts) if corrected[i] != text]:
            scores[others] = np.maximum(scores[others], self._log_odds([corrected[i] for i in others]))
        return scores

    @cached_property
    def _speller(self) -> Spelling:
        words = self.vocabulary["words"]
        counts = (self.idf * self.weights)[len(self.vocabulary["chars"]) :].tolist()
        known = {word: each for word, each in zip(words, counts, strict=True) if " " not in word}
        return Spelling(known, rules=self.spelling_rules, keeps_common=self.spelling_rules > 3)

    def _log_odds(self, texts: list[str]) -> np.ndarray:
        return self._n_grams.weighted(texts, self.weights) + self.bias

    def __repr__(self) -> str:
        num = sum(map(len, self.vocabulary.values()))
        return f"TextGate({num:,} n-grams, threshold={self.threshold:.3g})"


def _is_vocabulary(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == list(N_GRAMS) and all(map(is_texts, value.values()))
