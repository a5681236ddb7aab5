"""The search for a corruption: the published steps, the best that was tried, and what it says where it fails."""

from __future__ import annotations

import pytest
from helpers import build, make_collator, make_tokenizer, rows
from small_evaluations import learned

from spul.evaluation.metrics.scoring import score_completions
from spul.gates import NameGate
from spul.rivals import Corruption, EmbeddingCorruption, search_corruption, search_strength


def corrupted(corruption=None, base=None):
    base = build("llama") if base is None else base
    corruption = Corruption("noise", 0.1, 1) if corruption is None else corruption
    return EmbeddingCorruption(base, make_tokenizer(), NameGate(["jane"]), corruption).eval()


def curve(model):
    """A score that falls with the strength."""
    return 1 / (1 + model.corruption.strength)


def plain(target, start, lr, steps, tolerance):
    """The published steps written out: strengths in the order in which they are scored."""
    strength, eps, tried = start, 0.999 * start, []
    for _ in range(steps):
        high, low = strength + eps, max(strength - eps, 1e-8)
        distances = [abs(1 / (1 + s) - target) for s in (high, low)]
        tried += [high, low]
        if distances[0] == distances[1] or min(abs(1 / (1 + s) - target) for s in tried) <= tolerance:
            break
        strength = max(strength - lr * (distances[0] - distances[1]) / (2 * eps), start)
    return tried


@pytest.mark.parametrize("lr", [0.3, 2.0, 100.0])
def test_strengths_are_tried_in_the_published_steps(lr):
    model = corrupted()
    found = search_strength(model, curve, 0.25, start=0.1, lr=lr, steps=6, tolerance=0.01)
    expected = plain(0.25, 0.1, lr, 6, 0.01)
    assert [one.strength for one, _ in found.tried] == pytest.approx(expected)
    best = min(expected, key=lambda s: abs(1 / (1 + s) - 0.25))
    assert model.corruption.strength == found.best.strength == pytest.approx(best)
    assert found.distance == pytest.approx(abs(1 / (1 + best) - 0.25))


def test_it_ends_where_the_target_is_met():
    model = corrupted()
    found = search_strength(model, curve, 0.25, lr=2.0, steps=200, tolerance=0.02)
    assert found.distance <= 0.02
    assert len(found.tried) < 400
    assert model.corruption.dims == 1


def test_a_flat_score_ends_the_search_and_a_target_that_is_not_met_is_said(caplog):
    found = search_strength(corrupted(), lambda model: 0.9, 0.25, steps=5)
    assert len(found.tried) == 2
    assert "the target 0.25 is not reached: 2 strengths from 0.0001 to 0.1999 were tried, with scores" in caplog.text
    assert "from 0.9 to 0.9, and the nearest, of strength 0.1999, is 0.65 away (tolerance 0.02)" in caplog.text
    assert "No strength changed the score: pass a start= that is ten times as high or more." in caplog.text


def test_a_target_between_the_scores_is_said_with_what_was_tried_and_reached(caplog):
    found = search_strength(corrupted(), curve, 0.25, lr=0.3, steps=3, tolerance=1e-6)
    strengths = [one.strength for one, _ in found.tried]
    assert f"strengths from {min(strengths):g} to {max(strengths):g} were tried" in caplog.text
    assert f"scores from {min(score for _, score in found.tried):g} to {max(score for _, score in found.tried):g}" in (
        caplog.text
    )
    assert "Pass more steps= or another start=, or try given strengths (search_corruption)." in caplog.text


def test_accuracy_of_training_rows_brings_a_model_to_its_target():
    model, collator, forget = corrupted(base=learned()), make_collator(), rows("film", 8)
    model.gate = NameGate(["film"])

    def loss(model):
        return score_completions(model, forget, collator)["loss"]

    before = score_completions(model.get_base_model(), forget, collator)["loss"]
    strengths = [Corruption("noise", s, 32) for s in (0.01, 0.1, 1.0)]
    found = search_corruption(model, loss, 2 * before, strengths)
    assert [one for one, _ in found.tried] == strengths
    scores = [score for _, score in found.tried]
    assert scores[0] == pytest.approx(before, rel=0.2)
    assert len(set(scores)) == 3
    assert model.corruption == min(found.tried, key=lambda one: abs(one[1] - 2 * before))[0]


def test_of_equally_near_corruptions_the_first_is_taken():
    some = [Corruption("zero", dims=dims) for dims in (1, 2, 4)]
    model = corrupted(some[2])
    assert search_corruption(model, lambda model: 0.5, 0.5, some).best == some[0] == model.corruption


@pytest.mark.parametrize("score", [lambda model: 1 / 0, lambda model: float("nan")])
def test_a_score_that_fails_leaves_the_corruption(score):
    model = corrupted(Corruption("noise", 0.7, 2))
    for search in (
        lambda: search_strength(model, score, 0.2),
        lambda: search_corruption(model, score, 0.2, [Corruption("zero")]),
    ):
        with pytest.raises((ZeroDivisionError, ValueError)):
            search()
        assert model.corruption == Corruption("noise", 0.7, 2)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="use search_corruption"):
        search_strength(corrupted(Corruption("zero")), curve, 0.2)
    for wrong in ({"start": 0.0}, {"lr": 0.0}, {"lr": float("inf")}, {"steps": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            search_strength(corrupted(), curve, 0.2, **wrong)
    with pytest.raises(ValueError, match="corruptions is empty"):
        search_corruption(corrupted(), curve, 0.2, [])
