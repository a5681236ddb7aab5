"""Weighted ascent: WGA and SatImp against their formulas, their limits, and weights that have no gradient."""

from __future__ import annotations

import math

import pytest
import torch
from terms import LABELS, LOGITS, plain_nll, reduce

from spul.losses import WGA, GradientAscent, SatImp
from spul.losses.terms import token_nll


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_wga_equals_the_plain_formula_row_by_row(exponent, reduction):
    found = WGA(exponent=exponent, reduction=reduction)(LOGITS, LABELS).tolist()
    for row, loss in enumerate(found):
        terms = [math.exp(-nll) ** exponent * -nll for nll in plain_nll(LOGITS, LABELS, row)]
        assert loss == pytest.approx(reduce(terms, reduction))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("saturation", "importance"), [(5.0, 1.0), (5.0, 0.1), (0.0, 2.0)])
def test_satimp_equals_the_plain_formula_row_by_row(saturation, importance, reduction):
    found = SatImp(saturation=saturation, importance=importance, reduction=reduction)(LOGITS, LABELS).tolist()
    for row, loss in enumerate(found):
        terms = []
        for nll in plain_nll(LOGITS, LABELS, row):
            q = math.exp(-nll)
            terms.append(q**saturation * (1 - q) ** importance * math.log(q))
        assert loss == pytest.approx(reduce(terms, reduction))


def gradient(term) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    term(logits, LABELS).sum().backward()
    return logits.grad


def test_without_weights_both_are_gradient_ascent():
    expected = gradient(GradientAscent(reduction="mean"))
    torch.testing.assert_close(gradient(WGA(exponent=0.0)), expected)
    torch.testing.assert_close(gradient(SatImp(saturation=0.0, importance=0.0)), expected)
    torch.testing.assert_close(gradient(SatImp(saturation=2.0, importance=0.0)), gradient(WGA(exponent=2.0)))


def test_at_exponent_1_the_gradient_is_that_of_the_probability():
    logits = LOGITS.clone().requires_grad_()
    probability = torch.exp(-token_nll(logits, LABELS)).masked_fill(LABELS == -100, 0.0)
    (probability.sum(dim=1) / (LABELS != -100).sum(dim=1)).sum().backward()
    torch.testing.assert_close(gradient(WGA()), logits.grad)


def test_a_token_that_is_certain_has_no_weight_in_satimp_and_a_finite_gradient():
    logits = torch.tensor([[[80.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    SatImp()(logits, torch.tensor([[0, 1]])).sum().backward()
    assert bool((logits.grad[0, 0] == 0).all())
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, True, "1"])
def test_exponents_are_finite_and_not_negative(value):
    for kind, name in ((WGA, "exponent"), (SatImp, "saturation"), (SatImp, "importance")):
        with pytest.raises(ValueError, match=rf"{name}=.*expected a finite number of at least 0"):
            kind(**{name: value})
