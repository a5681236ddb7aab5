"""CE-U and UNDIAL against their formulas, and their limits: each other, self-distillation, bounded gradients."""

from __future__ import annotations

import math

import pytest
import torch
from terms import LABELS, LOGITS, REFERENCE, reduce

from spul.losses import CEU, UNDIAL


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def plain(row: int, adjusted, skip: int = 0) -> list[float]:
    """Cross-entropy of the model to softmax(adjusted(label, logits, base logits)) at each token but the first ones."""
    slots = [k for k, label in enumerate(LABELS[row].tolist()) if label != -100]
    found = []
    for k in slots[min(skip, len(slots) - 1) :]:
        own, base = LOGITS[row, k].tolist(), REFERENCE[row, k].tolist()
        target, model = softmax(adjusted(int(LABELS[row, k]), own, base)), softmax(own)
        found.append(-sum(t * math.log(p) for t, p in zip(target, model, strict=True)))
    return found


def without(label, own, base):
    return [-math.inf if v == label else score for v, score in enumerate(own)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_ceu_equals_the_plain_formula_and_trains_the_last_token_in_any_case(skip, reduction):
    found = CEU(skip=skip, reduction=reduction)(LOGITS, LABELS).tolist()
    assert found == pytest.approx([reduce(plain(row, without, skip), reduction) for row in range(4)])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("strength", [3.0, 10.0])
def test_undial_equals_the_plain_formula(strength, reduction):
    def lowered(label, own, base):
        return [score - strength * (v == label) for v, score in enumerate(base)]

    found = UNDIAL(strength=strength, reduction=reduction)(LOGITS, LABELS, REFERENCE).tolist()
    assert found == pytest.approx([reduce(plain(row, lowered), reduction) for row in range(4)])


def gradient(term, logits, reference=None) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    term(logits, LABELS, reference).sum().backward()
    return logits.grad


def test_the_target_of_ceu_has_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    CEU(skip=0, reduction="sum")(logits, LABELS).sum().backward()
    probability = LOGITS.softmax(dim=-1)
    target = LOGITS.scatter(2, LABELS.clamp(min=0)[..., None], -torch.inf).softmax(dim=-1)
    expected = (probability - target).masked_fill((LABELS == -100)[..., None], 0.0)
    torch.testing.assert_close(logits.grad, expected)


def test_undial_from_the_model_itself_is_ceu_as_the_strength_grows():
    strong = UNDIAL(strength=200.0)
    torch.testing.assert_close(strong(LOGITS, LABELS, LOGITS), CEU(skip=0)(LOGITS, LABELS))
    torch.testing.assert_close(gradient(strong, LOGITS, LOGITS), gradient(CEU(skip=0), LOGITS))


def test_undial_has_its_optimum_at_the_adjusted_base():
    index = LABELS.clamp(min=0)[..., None]
    best = REFERENCE.scatter(2, index, REFERENCE.gather(2, index) - 10.0)
    torch.testing.assert_close(gradient(UNDIAL(), best, REFERENCE), torch.zeros_like(best), rtol=0, atol=1e-12)


def test_the_gradient_of_ceu_stays_bounded_where_the_label_is_certain():
    certain = torch.full((1, 1, 5), -400.0)
    certain[..., 2] = 400.0
    certain.requires_grad_()
    CEU()(certain, torch.tensor([[2]])).sum().backward()
    assert bool(certain.grad.isfinite().all())
    assert certain.grad[0, 0, 2] == 1.0


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_a_number_of_skipped_tokens_is_whole_and_not_negative(value):
    with pytest.raises(ValueError, match=r"skip=.*expected a whole number of tokens of at least 0"):
        CEU(skip=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, True])
def test_a_strength_is_above_zero(value):
    with pytest.raises(ValueError, match=r"strength=.*expected a finite number above 0"):
        UNDIAL(strength=value)
