"""The gate by wording, against a plain pipeline of scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gated_texts import forget_texts, retain_texts
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from spul.gates import TextGate, load
from spul.gates.thresholds import checked_fit_texts, folds
from spul.gates.windows import SHORTEST

FORGET, RETAIN = forget_texts(), retain_texts()
LONG = " ".join(retain_texts(40, seed=7))
ODD = [
    "",
    " ",
    "???",
    "\uff2a\uff41\uff4e\uff45 \uff24\uff4f\uff45",
    "x" * 500,
    LONG,
    f"{LONG} jane doe in plot 3 {LONG}",
]


def plain(texts, labels, min_texts=2):
    chars = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=min_texts)
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, min_df=min_texts)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    return make_pipeline(make_union(chars, words), model).fit(texts, labels)


@pytest.fixture(scope="module")
def gate():
    return TextGate.fit(FORGET, RETAIN, recall=0.9, paraphrases=["ms doe, jane, was in film 3", "a short film"])


@pytest.mark.parametrize("min_texts", [1, 2])
def test_scores_are_those_of_a_plain_pipeline(min_texts):
    gate = TextGate.fit(FORGET, RETAIN, recall=0.9, min_texts=min_texts)
    pipeline = plain(FORGET + RETAIN, [True] * len(FORGET) + [False] * len(RETAIN), min_texts)
    texts = [
        text for text in [*forget_texts(seed=3), *retain_texts(seed=4), "", "???"] if len(text) <= gate.windows[-1]
    ]
    assert len(texts) > 90
    np.testing.assert_allclose(gate.scores(texts), pipeline.decision_function(texts), rtol=1e-9, atol=1e-9)


def test_a_long_text_scores_as_the_highest_of_its_passages(gate):
    start = LONG.index("the", 200)
    passage = LONG[start : start + 60]
    assert gate.scores([LONG])[0] >= gate.scores([passage[: gate.windows[0] // 2].strip()])[0] - 2.0
    scores = gate.scores([LONG, f"{LONG} jane doe in plot 3 {LONG}"])
    assert scores[1] > scores[0] + 1
    pipeline = plain(FORGET + RETAIN, [True] * len(FORGET) + [False] * len(RETAIN))
    assert pipeline.decision_function([f"{LONG} jane doe in plot 3 {LONG}"])[0] < scores[1] - 1


def test_threshold_and_report_are_of_pipelines_fit_without_the_fold():
    """Long retain texts are scored by windows in the threshold, too."""
    retain = [*RETAIN, *(" ".join(retain_texts(12, seed=i)) for i in range(20, 24))]
    gate = TextGate.fit(FORGET, retain, recall=0.9, seed=3)
    given = checked_fit_texts(FORGET, retain, None, 0.9)
    fold, held_out = folds(given, 3), np.zeros(len(given.texts))
    for i, text in enumerate(given.texts):
        outside = np.flatnonzero(fold != fold[i])
        part = fit_once(tuple(given.texts[j] for j in outside), tuple(given.is_forget[outside]))
        held_out[i] = max(part.decision_function([one for size in gate.windows for one in pieces(text, size)]))
    forget, others = held_out[: len(FORGET)], held_out[len(FORGET) :]
    assert gate.threshold == pytest.approx(np.sort(forget)[::-1][36 - 1])  # 0.9 of 40
    assert gate.report.recall.flagged == 36
    near = np.isclose(others, gate.threshold)
    assert not near.any()
    assert gate.report.false_alarms.flagged == (others >= gate.threshold).sum()
    assert gate.report.recall_asked == 0.9
    assert gate.report.source == "cross-validation, 5 folds"


FITS: dict = {}


def fit_once(texts, labels):
    if texts not in FITS:
        FITS[texts] = plain(list(texts), list(labels))
    return FITS[texts]


def pieces(text, size):
    """Windows by hand: from every half size, each widened to whole words."""
    found = [text]
    if len(text) > size:
        last = len(text) - size
        for start in [*range(0, last, size // 2), last]:
            end = start + size
            while start > 0 and text[start - 1] != " ":
                start -= 1
            while end < len(text) and text[end] != " ":
                end += 1
            found.append(text[start:end])
    return found


def test_misspelled_words_score_as_the_nearest_known_ones_where_that_is_higher(gate):
    wrong, right = "jnae deo in film 3 was goood", "jane doe in film 3 was good"
    assert gate.scores([wrong])[0] == pytest.approx(gate.scores([right])[0])
    pipeline = plain(FORGET + RETAIN, [True] * len(FORGET) + [False] * len(RETAIN))
    as_it_is = TextGate.fit(FORGET, RETAIN, recall=0.9, spelling=False)
    assert as_it_is.scores([wrong])[0] == pytest.approx(pipeline.decision_function([wrong])[0])
    for before in ("", f"{LONG} "):
        assert as_it_is.scores([before + wrong])[0] < gate.scores([before + wrong])[0] - 1
    known = [*FORGET, *RETAIN]
    assert np.array_equal(as_it_is.scores(known), gate.scores(known))


def test_a_gate_saved_before_spelling_was_read_reads_none(gate, tmp_path):
    gate.save(tmp_path)
    path = tmp_path / "gate.json"
    fields = json.loads(path.read_text())
    assert fields.pop("spelling") is True
    path.write_text(json.dumps(fields))
    wrong = "jnae deo in film 3 was goood"
    assert load(tmp_path).scores([wrong])[0] < gate.scores([wrong])[0] - 1
    path.write_text(json.dumps({**fields, "spelling": 1}))
    with pytest.raises(ValueError, match=r"spelling.*1.*true or false"):
        load(tmp_path)


def test_paraphrases_are_reported_apart_and_not_fit_on(gate):
    other = TextGate.fit(FORGET, RETAIN, recall=0.9)
    assert other.report.paraphrases is None
    assert np.array_equal(other.weights, gate.weights)
    assert (gate.report.paraphrases.flagged, gate.report.paraphrases.texts) == (1, 2)
    assert gate.report.recall == other.report.recall


def test_the_same_seed_gives_the_same_gate():
    one, same, other = (TextGate.fit(FORGET, RETAIN, recall=0.9, seed=seed) for seed in (0, 0, 1))
    assert one.threshold == same.threshold
    assert one.threshold != other.threshold
    assert np.array_equal(one.scores(FORGET + ODD), same.scores(FORGET + ODD))


def test_full_width_letters_are_no_way_around(gate):
    assert np.array_equal(gate.scores([ODD[3]]), gate.scores(["jane doe"]))


@pytest.mark.parametrize("windows", [[], [SHORTEST - 1], [100], [100, 60], [50, 100]])
def test_windows_that_a_saved_gate_could_not_have_are_refused(gate, windows):
    made = TextGate(gate.vocabulary, gate.idf, gate.weights, gate.bias, gate.threshold, tuple(gate.windows))
    assert np.array_equal(made.scores(ODD), gate.scores(ODD))
    with pytest.raises(ValueError, match="its half, a quarter and an eighth from 32 on"):
        TextGate(gate.vocabulary, gate.idf, gate.weights, gate.bias, gate.threshold, windows)


def test_a_saved_gate_scores_the_same_to_the_last_bit(gate, tmp_path):
    """In another process, too: see the gate by hidden states."""
    texts = [*forget_texts(seed=3), *retain_texts(seed=4), *ODD]
    gate.save(tmp_path / "gate")
    again = load(tmp_path / "gate")
    assert (again.threshold, again.windows, again.report) == (gate.threshold, gate.windows, gate.report)
    assert np.array_equal([again.scores([text])[0] for text in texts], gate.scores(texts))
    assert np.array_equal(again.scores(texts), gate.scores(texts))
    again.save(tmp_path / "again")
    for name in ("gate.json", "gate.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "gate" / name).read_bytes()


def test_a_saved_gate_holds_no_text_and_no_n_gram_of_one_text_alone(tmp_path):
    secret = "jane doe owes zanzibar quartz"
    TextGate.fit([*FORGET, secret], RETAIN, recall=0.9).save(tmp_path)
    content = (tmp_path / "gate.json").read_text()
    assert '"jane doe"' in content
    assert not [word for word in ("owes", "zanzibar", "quartz") if word in content]
    assert not [text for text in FORGET if text in content]


def test_texts_without_n_grams_in_common_are_refused():
    with pytest.raises(ValueError, match=r"no n-gram \(chars\) is in 9 of 2 texts.*lower min_texts"):
        TextGate.fit(["ab", "cd"], ["ef", "gh"], min_texts=9)
    with pytest.raises(ValueError, match="min_texts=0"):
        TextGate.fit(FORGET, RETAIN, min_texts=0)


def test_a_recall_that_flags_everything_is_refused_with_what_can_be_reached():
    draws = np.random.default_rng(0)
    alike = [" ".join(draws.choice(["a", "b", "c", "d", "e"], 6)) for _ in range(60)]
    alike = list(dict.fromkeys(alike))
    with pytest.raises(
        ValueError, match=r"recall of 1\.0 cannot be reached on \d+ held-out .* Reached without that: 0"
    ):
        TextGate.fit(["same words here", "other words there"], ["same words there", "other words here"], recall=1.0)
    report = TextGate.fit(alike[:20], alike[20:], recall=0.5).report  # nothing to tell them by
    assert report.false_alarms.share > 0.2


def test_empty_input_is_no_failure(gate):
    assert gate.scores([]).shape == (0,)
    assert gate.flags([]).shape == (0,)
    assert np.isfinite(gate.scores(ODD)).all()
    assert not gate.failures


@pytest.mark.parametrize("num_texts", [12, 40])
def test_a_gate_flags_the_texts_it_was_fit_on_where_each_has_a_number_of_its_own(num_texts):
    forget, retain = ([f"review {name} {i} :" for i in range(num_texts)] for name in ("jane", "mary"))
    gate = TextGate.fit(forget, retain, recall=0.95)
    assert gate.flags(forget).mean() >= 0.95
    assert not gate.flags(retain).any()
