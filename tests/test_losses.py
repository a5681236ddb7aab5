"""The terms of the loss against plain formulas, and their composition."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from terms import IS_FORGET, LABELS, LOGITS, REFERENCE, VOCABULARY, plain_nll, reduce
from torch.distributions import Categorical, kl_divergence

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
RETAIN_REFERENCE = REFERENCE[~IS_FORGET]


def plain_kl(p_logits: torch.Tensor, q_logits: torch.Tensor, labels: torch.Tensor, row: int) -> list[float]:
    """KL(p || q) at each response token of a row."""
    slots = [k for k, label in enumerate(labels[row].tolist()) if label != -100]
    return [
        float(kl_divergence(Categorical(logits=p_logits[row, k]), Categorical(logits=q_logits[row, k]))) for k in slots
    ]


@dataclass(frozen=True)
class Raising(LossTerm):
    """A spy: whoever calls it fails."""

    def token_losses(self, logits, labels, reference_logits=None):
        raise AssertionError("the term was called")


@dataclass(frozen=True)
class Brier(LossTerm):
    """A user's own term: squared distance to the one-hot target, times a weight."""

    weight: float = 1.0

    def token_losses(self, logits, labels, reference_logits=None):
        target = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])
        return self.weight * (logits.softmax(dim=-1) - target).pow(2).sum(dim=-1)


@dataclass(frozen=True)
class ReferenceGap(LossTerm):
    """A custom term that reads the base model."""

    needs_reference = True

    def token_losses(self, logits, labels, reference_logits=None):
        return (logits - reference_logits).sum(dim=-1)


# ---- terms ----


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


# ---- composition ----


def test_each_term_is_the_mean_over_the_rows_of_its_own_group():
    out = UnlearningLoss(alpha=0.3, beta=0.7)(LOGITS, LABELS, IS_FORGET, RETAIN_REFERENCE)
    nll = [sum(plain_nll(LOGITS, LABELS, row)) for row in range(4)]
    kl = [sum(plain_kl(LOGITS, REFERENCE, LABELS, row)) for row in range(4)]
    forget, retain, divergence = (nll[0] + nll[3]) / 2, (nll[1] + nll[2]) / 2, (kl[1] + kl[2]) / 2
    assert out.forget_loss.item() == pytest.approx(forget)
    assert out.retain_loss.item() == pytest.approx(retain)
    assert out.kl_loss.item() == pytest.approx(divergence)
    assert out.loss.item() == pytest.approx(forget + 0.3 * retain + 0.7 * divergence)
    assert all(value.shape == () for value in vars(out).values())


def test_groups_of_unequal_size_weigh_alike():
    is_forget = torch.tensor([True, False, False, False])
    out = UnlearningLoss(alpha=1.0, beta=0.0)(LOGITS, LABELS, is_forget)
    nll = [sum(plain_nll(LOGITS, LABELS, row)) for row in range(4)]
    assert out.loss.item() == pytest.approx(nll[0] + sum(nll[1:]) / 3)


def test_a_group_counts_its_rows_without_response_tokens_too():
    labels = LABELS.clone()
    labels[3] = -100
    out = UnlearningLoss(beta=0.0)(LOGITS, labels, IS_FORGET)
    assert out.forget_loss.item() == pytest.approx(sum(plain_nll(LOGITS, LABELS, 0)) / 2)


def test_an_absent_group_contributes_exactly_zero_and_the_rest_has_gradients():
    loss = UnlearningLoss(alpha=1.0, beta=1.0)
    logits = LOGITS.clone().requires_grad_()
    only_forget = loss(logits, LABELS, torch.ones(4, dtype=torch.bool))
    assert only_forget.retain_loss == 0
    assert only_forget.kl_loss == 0
    assert only_forget.loss == only_forget.forget_loss
    only_forget.loss.backward()
    assert bool(logits.grad.abs().sum() > 0)

    only_retain = loss(LOGITS, LABELS, torch.zeros(4, dtype=torch.bool), REFERENCE)
    assert only_retain.forget_loss == 0
    assert only_retain.loss == only_retain.retain_loss + only_retain.kl_loss


def test_an_absent_group_is_zero_even_where_its_count_is_zero():
    out = UnlearningLoss(beta=0.0)(LOGITS, LABELS, torch.zeros(4, dtype=torch.bool), None, torch.tensor(0.0), 4)
    assert out.forget_loss == 0
    assert math.isfinite(out.loss)


@pytest.mark.parametrize(("weights", "spied"), [({"alpha": 0.0}, "retain"), ({"beta": 0.0}, "kl")])
def test_a_term_of_weight_zero_is_not_called(weights, spied):
    reference = RETAIN_REFERENCE if spied == "retain" else None  # without the KL term there is nothing to compare
    out = UnlearningLoss(**weights, **{spied: Raising()})(LOGITS, LABELS, IS_FORGET, reference)
    assert getattr(out, f"{spied}_loss") == 0
    with pytest.raises(AssertionError, match="was called"):
        UnlearningLoss(**{spied: Raising()})(LOGITS, LABELS, IS_FORGET, reference)


def test_terms_see_only_the_rows_of_their_group():
    logits = LOGITS.clone()
    before = UnlearningLoss()(logits, LABELS, IS_FORGET, RETAIN_REFERENCE)
    logits[0] += torch.arange(VOCABULARY)
    changed = UnlearningLoss()(logits, LABELS, IS_FORGET, RETAIN_REFERENCE)
    assert changed.forget_loss != before.forget_loss
    assert (changed.retain_loss, changed.kl_loss) == (before.retain_loss, before.kl_loss)


def test_each_group_gets_its_own_part_of_the_reference():
    both = UnlearningLoss(alpha=0.0, beta=1.0, forget=ReferenceGap(), kl=ReferenceGap())
    out = both(LOGITS, LABELS, IS_FORGET, REFERENCE)
    gap = (LOGITS - REFERENCE).sum(dim=-1).masked_fill(LABELS == -100, 0.0).sum(dim=1)
    torch.testing.assert_close(out.forget_loss, (gap[0] + gap[3]) / 2)
    torch.testing.assert_close(out.kl_loss, (gap[1] + gap[2]) / 2)


def test_a_reference_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="reference_logits have 4 rows, and 2 of 4 rows have a term that compares"):
        UnlearningLoss()(LOGITS, LABELS, IS_FORGET, REFERENCE)


@pytest.mark.parametrize("split", [[(0, 1), (1, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]])
def test_micro_batches_with_the_counts_of_the_step_add_up_to_the_whole_batch(split):
    loss = UnlearningLoss(alpha=0.5, beta=0.25)
    whole = LOGITS.clone().requires_grad_()
    full = loss(whole, LABELS, IS_FORGET, RETAIN_REFERENCE)
    full.loss.backward()

    parts = LOGITS.clone().requires_grad_()
    totals = torch.zeros(5, dtype=torch.float64)
    for start, stop in split:
        some = slice(start, stop)
        retain = REFERENCE[some][~IS_FORGET[some]]
        out = loss(parts[some], LABELS[some], IS_FORGET[some], retain, torch.tensor(2.0), 2)
        out.loss.backward()
        totals += torch.stack([out.loss, out.forget_loss, out.retain_loss, out.kl_loss, out.lm_loss]).detach()
    torch.testing.assert_close(totals, torch.stack(list(vars(full).values())).detach())
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (UnlearningLoss(), [False, True, True, False]),
        (UnlearningLoss(beta=0.0), [False, False, False, False]),
        (UnlearningLoss(beta=0.0, retain=KLDivergence()), [False, True, True, False]),
        (UnlearningLoss(alpha=0.0, beta=0.0, retain=KLDivergence()), [False, False, False, False]),
        (UnlearningLoss(beta=0.0, forget=KLDivergence()), [True, False, False, True]),
        (UnlearningLoss(forget=ReferenceGap()), [True, True, True, True]),
        (UnlearningLoss(beta=0.0, forget=NPO()), [True, False, False, True]),
        (UnlearningLoss(beta=0.0, forget=SimNPO()), [False, False, False, False]),
    ],
)
def test_rows_needing_reference_are_those_whose_terms_read_it(loss, expected):
    assert loss.rows_needing_reference(IS_FORGET).tolist() == expected
    assert loss.needs_reference is any(expected)


@pytest.mark.parametrize(("alpha", "beta", "expected"), [(0, 0, False), (0.1, 0, True), (0, 0.1, True)])
def test_retain_rows_matter_unless_both_weights_are_zero(alpha, beta, expected):
    assert UnlearningLoss(alpha=alpha, beta=beta).uses_retain_rows is expected


def test_a_term_of_the_users_own_works_in_any_place():
    out = UnlearningLoss(alpha=1.0, beta=0.0, forget=Brier(weight=3.0), retain=Brier(reduction="mean"))(
        LOGITS, LABELS, IS_FORGET
    )
    brier = torch.zeros(4, 3, dtype=torch.float64)
    for b in range(4):
        for k in range(3):
            if LABELS[b, k] != -100:
                for v in range(VOCABULARY):
                    brier[b, k] += (Categorical(logits=LOGITS[b, k]).probs[v] - float(v == LABELS[b, k])) ** 2
    torch.testing.assert_close(out.forget_loss, 3.0 * (brier[0].sum() + brier[3].sum()) / 2)
    torch.testing.assert_close(out.retain_loss, (brier[1].sum() / 1 + brier[2].sum() / 2) / 2)


def test_a_term_of_the_users_own_gets_the_reference_of_its_rows():
    out = UnlearningLoss(alpha=0.0, beta=0.0, forget=ReferenceGap())(LOGITS, LABELS, IS_FORGET, REFERENCE[IS_FORGET])
    gap = (LOGITS - REFERENCE).sum(dim=-1)
    torch.testing.assert_close(out.loss, (gap[0].sum() + gap[3, :2].sum()) / 2)


def test_a_term_that_defines_nothing_says_what_to_define():
    with pytest.raises(NotImplementedError, match=r"LossTerm must define token_losses\(logits, labels"):
        LossTerm()(LOGITS, LABELS)


# ---- what is refused ----


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1", None, True, False])
def test_weights_must_be_finite_and_not_negative(name, weight):
    with pytest.raises(ValueError, match=f"{name}={weight!r}: expected a finite number of at least 0"):
        UnlearningLoss(**{name: weight})


@pytest.mark.parametrize("name", ["forget", "retain", "kl"])
@pytest.mark.parametrize("term", ["CrossEntropy", CrossEntropy, torch.nn.CrossEntropyLoss()])
def test_terms_must_be_loss_terms(name, term):
    with pytest.raises(TypeError, match=rf"{name}=.*is not a LossTerm; pass an instance such as CrossEntropy\(\)"):
        UnlearningLoss(**{name: term})


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


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="KLDivergence compares with the base model: pass reference_logits"):
        KLDivergence()(LOGITS, LABELS)
    with pytest.raises(ValueError, match="pass reference_logits"):
        UnlearningLoss()(LOGITS, LABELS, IS_FORGET)


# ---- saving ----


@pytest.mark.parametrize(
    "loss",
    [
        UnlearningLoss(),
        UnlearningLoss(
            alpha=0.1,
            beta=0.0,
            forget=GradientAscent(reduction="mean"),
            retain=KLDivergence(direction="forward"),
            kl=KLDivergence(direction="forward", reduction="mean"),
        ),
        UnlearningLoss(forget=NPO(inverse_temperature=0.3)),
        UnlearningLoss(forget=SimNPO(inverse_temperature=3.0, margin=0.5)),
        UnlearningLoss(gamma=0.2, forget=KLAscent(cap=4.0), lm=GradientAscent(reduction="mean", cap=8.0)),
    ],
)
def test_a_loss_survives_the_way_through_json(loss):
    assert UnlearningLoss.from_dict(json.loads(json.dumps(loss.to_dict()))) == loss


def test_the_saved_loss_is_plain_data():
    assert UnlearningLoss(forget=Brier(weight=2.0)).to_dict() == {
        "alpha": 1.0,
        "beta": 0.5,
        "forget": {"type": "test_losses.Brier", "reduction": "sum", "weight": 2.0},
        "retain": {"type": "CrossEntropy", "reduction": "auto"},
        "kl": {"type": "KLDivergence", "reduction": "auto", "direction": "reverse"},
        "gamma": 0.0,
        "lm": {"type": "GradientAscent", "reduction": "mean", "cap": None},
    }


def test_a_record_from_before_there_was_an_lm_term_still_loads():
    saved = {key: value for key, value in UnlearningLoss().to_dict().items() if key not in ("gamma", "lm")}
    assert UnlearningLoss.from_dict(saved) == UnlearningLoss()


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


@pytest.mark.parametrize("cap", [0, -1.0, True, "ten", float("nan")])
@pytest.mark.parametrize("term", [GradientAscent, KLAscent])
def test_a_cap_that_is_no_number_above_zero_is_refused(term, cap):
    with pytest.raises(ValueError, match="expected a number of nats above 0, or None for no cap"):
        term(cap=cap)


def test_the_lm_term_needs_its_texts_and_cannot_compare():
    loss = UnlearningLoss(gamma=0.2, beta=0.0)
    with pytest.raises(ValueError, match=r"gamma=0\.2 needs the prompt texts of \d+ forget rows"):
        loss(LOGITS, LABELS, IS_FORGET)
    with pytest.raises(ValueError, match="compares with the base model, whose logits at prompt texts"):
        UnlearningLoss(gamma=0.2, lm=KLDivergence())
    with pytest.raises(ValueError, match="gamma=-1"):
        UnlearningLoss(gamma=-1)


def test_a_saved_term_of_the_users_own_cannot_be_rebuilt_and_the_message_says_what_to_do():
    saved = UnlearningLoss(forget=Brier()).to_dict()
    with pytest.raises(ValueError, match=r"uses the term 'test_losses\.Brier', which .*pass the loss yourself"):
        UnlearningLoss.from_dict(saved)


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
