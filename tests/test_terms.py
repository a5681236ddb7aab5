"""The terms of the loss against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from terms import (
    IS_FORGET,
    LABELS,
    LOGITS,
    REFERENCE,
    RETAIN_REFERENCE,
    Brier,
    plain_kl,
    plain_nll,
    reduce,
)

from spul import UnlearningLoss
from spul.losses import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    CrossEntropy,
    GradientAscent,
    KLAscent,
    KLDivergence,
    LossTerm,
    SatImp,
    SimNPO,
    StateDistance,
)
from spul.losses.terms import token_nll

TERMS = [CrossEntropy(), GradientAscent(), KLDivergence(), KLDivergence(direction="forward"), NPO(), SimNPO()]
# The logits stand for states in the last two.
TERMS += [DPO(), WGA(), SatImp(), CEU(skip=0), UNDIAL(), RMU(), StateDistance()]


def test_cross_entropy_of_a_literal_distribution():
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]], dtype=torch.float64).log()
    labels = torch.tensor([[0, 2]])
    torch.testing.assert_close(
        CrossEntropy()(logits, labels), torch.tensor([-math.log(0.5) - math.log(0.8)], dtype=torch.float64)
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_cross_entropy_and_gradient_ascent_equal_the_plain_formula_row_by_row(reduction):
    expected = torch.tensor([reduce(plain_nll(LOGITS, LABELS, row), reduction) for row in range(4)]).double()
    actual = CrossEntropy(reduction=reduction)(LOGITS, LABELS)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(GradientAscent(reduction=reduction)(LOGITS, LABELS), -actual)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_equals_the_plain_formula_in_the_direction_it_names(direction, reduction):
    p, q = (LOGITS, REFERENCE) if direction == "reverse" else (REFERENCE, LOGITS)
    expected = torch.tensor([reduce(plain_kl(p, q, LABELS, row), reduction) for row in range(4)]).double()
    actual = KLDivergence(direction=direction, reduction=reduction)(LOGITS, LABELS, REFERENCE)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduced", [lambda nll: nll.sum(), lambda nll: nll.sum(1), lambda nll: nll.sum(1, True)])
def test_a_term_of_ones_own_that_reduces_its_token_losses_is_refused_instead_of_spread(reduced):
    class Mine(LossTerm):
        def token_losses(self, logits, labels, reference_logits=None):
            return reduced(token_nll(logits, labels))

    with pytest.raises(
        ValueError, match=r"Mine\.token_losses returned the shape \(.*; expected \(rows, K\), here \(4, "
    ):
        Mine()(LOGITS, LABELS)


def test_a_term_of_ones_own_that_averages_its_rows_is_refused():
    class Mine(CrossEntropy):
        def row_losses(self, reduced):
            return reduced.mean()

    with pytest.raises(ValueError, match=r"Mine\.row_losses returned the shape \(\); expected \(rows,\), here \(4,\)"):
        Mine()(LOGITS, LABELS)


def test_kl_of_a_literal_pair_is_reverse_by_default():
    prompted = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    frozen = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log()
    labels = torch.tensor([[1]])
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(KLDivergence()(prompted, labels, frozen)) == pytest.approx(reverse, abs=1e-12)
    assert float(KLDivergence(direction="forward")(prompted, labels, frozen)) == pytest.approx(forward, abs=1e-12)
    assert reverse != pytest.approx(forward, abs=1e-3)


@pytest.mark.parametrize("inverse_temperature", [0.1, 2.0])
def test_npo_equals_the_plain_formula_of_whole_responses(inverse_temperature):
    found = NPO(inverse_temperature=inverse_temperature)(LOGITS, LABELS, REFERENCE).tolist()
    for row, loss in enumerate(found):
        log_ratio = sum(plain_nll(REFERENCE, LABELS, row)) - sum(plain_nll(LOGITS, LABELS, row))
        ratio = math.exp(log_ratio)  # pi / pi_ref
        assert loss == pytest.approx(2 / inverse_temperature * math.log(1 + ratio**inverse_temperature))


@pytest.mark.parametrize(("inverse_temperature", "margin"), [(2.5, 0.0), (4.5, 0.7)])
def test_simnpo_equals_the_plain_formula_per_token(inverse_temperature, margin):
    found = SimNPO(inverse_temperature=inverse_temperature, margin=margin)(LOGITS, LABELS).tolist()
    for row, loss in enumerate(found):
        nll = plain_nll(LOGITS, LABELS, row)
        bent = inverse_temperature * sum(nll) / len(nll) - margin
        assert loss == pytest.approx(-2 / inverse_temperature * math.log(1 / (1 + math.exp(-bent))))


def test_the_gradient_of_npo_goes_to_that_of_gradient_ascent_as_the_temperature_rises():
    logits, other = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    NPO(inverse_temperature=1e-6)(logits, LABELS, REFERENCE).sum().backward()
    GradientAscent()(other, LABELS).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", [NPO, SimNPO])
def test_an_inverse_temperature_is_above_zero(kind, value):
    with pytest.raises(ValueError, match=r"inverse_temperature=.*expected a finite number above 0"):
        kind(inverse_temperature=value)


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match=r"margin=-1\.0: expected"):
        SimNPO(margin=-1.0)


def test_terms_that_make_a_completion_unlikely_say_so():
    unlikely = (GradientAscent, NPO, SimNPO, WGA, SatImp, CEU, UNDIAL, RMU)
    assert [term.makes_unlikely for term in TERMS] == [isinstance(term, unlikely) for term in TERMS]


def test_kl_between_equal_distributions_is_zero_whatever_constant_the_logits_differ_by():
    torch.testing.assert_close(
        KLDivergence()(LOGITS, LABELS, LOGITS + 7.0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("term", TERMS)
def test_unused_slots_change_neither_loss_nor_gradient(term):
    disturbed = LOGITS.clone()
    disturbed[LABELS == -100] = 1e4
    logits, other = LOGITS.clone().requires_grad_(), disturbed.requires_grad_()
    losses, others = term(logits, LABELS, REFERENCE), term(other, LABELS, REFERENCE)
    losses.sum().backward()
    others.sum().backward()
    torch.testing.assert_close(others, losses)
    torch.testing.assert_close(other.grad, logits.grad)
    assert bool((logits.grad[LABELS == -100] == 0).all())
    assert bool((logits.grad[LABELS != -100].abs().sum(dim=-1) > 0).all())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", [CrossEntropy, GradientAscent, KLDivergence, NPO, SimNPO, WGA, SatImp, CEU])
def test_a_row_without_response_tokens_is_exactly_zero(kind, reduction):
    labels = torch.tensor([[-100, -100, -100], [1, 1, -100]])
    losses = kind(reduction=reduction)(LOGITS[:2], labels, REFERENCE[:2])
    assert losses[0] == 0
    assert losses[1] != 0


def test_token_nll_is_zero_in_unused_slots_and_has_the_shape_of_the_labels():
    nll = token_nll(LOGITS, LABELS)
    assert nll.shape == LABELS.shape
    assert bool((nll[LABELS == -100] == 0).all())
    assert nll[3, 1].item() == pytest.approx(plain_nll(LOGITS, LABELS, 3)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", TERMS)
def test_half_precision_logits_are_compared_in_float32(term, dtype):
    logits, reference = LOGITS.to(dtype), REFERENCE.to(dtype)
    losses = term(logits, LABELS, reference)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, term(logits.float(), LABELS, reference.float()), rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("impossible", [False, True])
def test_the_gradient_of_the_kl_is_that_of_autograd(direction, impossible):
    reference = REFERENCE.clone()
    if impossible:
        # Where both rule a token out; a token that one alone rules out makes its divergence infinite.
        reference[:, :, 2] = -torch.inf
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    gradients = []
    for kind in ("written out", "autograd"):
        logits = LOGITS.clone()
        if impossible:
            logits[:, :, 2] = -torch.inf
        logits.requires_grad_()
        if kind == "written out":
            per_row = KLDivergence(direction=direction)(logits, LABELS, reference)
        else:
            possible = [0, 1, 3, 4] if impossible else [0, 1, 2, 3, 4]
            p, q = (z[:, :, possible].log_softmax(-1) for z in (logits, reference))
            target, other = (p, q) if direction == "reverse" else (q, p)
            per_row = (target.exp() * (target - other)).sum(-1).masked_fill(LABELS == -100, 0.0).sum(1)
        (per_row * weights).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 1


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_passes_gradcheck_and_keeps_one_tensor_of_the_vocabulary(direction):
    logits = LOGITS.clone().requires_grad_()
    term = KLDivergence(direction=direction)
    assert torch.autograd.gradcheck(lambda z: term.token_losses(z, LABELS, REFERENCE), (logits,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        term.token_losses(logits, LABELS, REFERENCE)
    assert kept == [LOGITS.shape]


def test_the_kl_is_not_rounded_to_16_bit_under_autocast():
    plain = KLDivergence()(LOGITS.float(), LABELS, REFERENCE.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = KLDivergence()(LOGITS.float(), LABELS, REFERENCE.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)


def test_double_precision_logits_stay_double():
    assert CrossEntropy()(LOGITS, LABELS).dtype == torch.float64
    assert UnlearningLoss()(LOGITS, LABELS, IS_FORGET, RETAIN_REFERENCE).loss.dtype == torch.float64


def test_a_term_that_defines_nothing_says_what_to_define():
    with pytest.raises(NotImplementedError, match=r"LossTerm must define token_losses\(logits, labels"):
        LossTerm()(LOGITS, LABELS)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"direction='backward' is not known.*KL\(trained \|\| base\)"):
        KLDivergence(direction="backward")


@pytest.mark.parametrize("kind", [CrossEntropy, GradientAscent, KLDivergence, Brier])
def test_an_unknown_reduction_is_refused(kind):
    with pytest.raises(ValueError, match="reduction='none' is not known; pass 'sum' or 'mean'"):
        kind(reduction="none")


@pytest.mark.parametrize("labels", [LABELS[:, :2], LABELS[:3], LABELS.flatten()])
def test_labels_that_do_not_match_the_logits_are_refused_with_both_shapes(labels):
    with pytest.raises(ValueError, match=r"labels of shape \(.*\) do not match logits of shape \(4, 3, 5\)"):
        CrossEntropy()(LOGITS, labels)


def test_a_cap_holds_each_tokens_ascent_and_its_gradient():
    logits = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0]])  # 4.04 and ln 3 = 1.10 nats
    loss = GradientAscent(cap=2.0)(logits, labels)
    torch.testing.assert_close(loss, torch.tensor([-2.0 - math.log(3)], dtype=torch.float64))
    loss.sum().backward()
    assert (logits.grad[0, 0] == 0).all()
    assert (logits.grad[0, 1] != 0).all()


def test_kl_ascent_is_the_capped_negative_of_the_forward_kl():
    reference = REFERENCE
    forward = KLDivergence(direction="forward").token_losses(LOGITS, LABELS, reference)
    expected = -forward.clamp(max=0.3).masked_fill(LABELS == -100, 0.0).sum(1)
    torch.testing.assert_close(KLAscent(cap=0.3)(LOGITS, LABELS, reference), expected)
    torch.testing.assert_close(
        KLAscent()(LOGITS, LABELS, reference), -KLDivergence(direction="forward")(LOGITS, LABELS, reference)
    )
    assert ((forward > 0.3) & (LABELS != -100)).any()


@pytest.mark.parametrize("cap", [0, -1.0, True, "ten", float("nan"), float("inf")])
@pytest.mark.parametrize("term", [GradientAscent, KLAscent])
def test_a_cap_that_is_no_number_above_zero_is_refused(term, cap):
    with pytest.raises(ValueError, match="expected a number of nats above 0, or None for no cap"):
        term(cap=cap)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_of_logits_with_a_masked_vocabulary_is_finite(direction):
    logits = torch.tensor([[[1.0, 2.0, -torch.inf]]], requires_grad=True)
    frozen = torch.tensor([[[2.0, 1.0, -torch.inf]]])
    value = KLDivergence(direction=direction)(logits, torch.tensor([[0]]), frozen)
    p, q = torch.softmax(torch.tensor([1.0, 2.0]), 0), torch.softmax(torch.tensor([2.0, 1.0]), 0)
    p, q = (p, q) if direction == "reverse" else (q, p)
    torch.testing.assert_close(value, (p * (p / q).log()).sum()[None])
    value.sum().backward()
    assert logits.grad.isfinite().all()
