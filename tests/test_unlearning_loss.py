"""The composition of the loss from terms, what it refuses, and its record."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from terms import (
    IS_FORGET,
    LABELS,
    LOGITS,
    REFERENCE,
    RETAIN_REFERENCE,
    VOCABULARY,
    Brier,
    plain_kl,
    plain_nll,
)
from torch.distributions import Categorical

from spul import UnlearningLoss
from spul.losses import (
    NPO,
    CrossEntropy,
    GradientAscent,
    KLAscent,
    KLDivergence,
    LossTerm,
    SimNPO,
)


@dataclass(frozen=True)
class Raising(LossTerm):
    """A spy: whoever calls it fails."""

    def token_losses(self, logits, labels, reference_logits=None):
        raise AssertionError("the term was called")


@dataclass(frozen=True)
class ReferenceGap(LossTerm):
    """A custom term that reads the base model."""

    needs_reference = True

    def token_losses(self, logits, labels, reference_logits=None):
        return (logits - reference_logits).sum(dim=-1)


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


# ---- what is refused ----


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), 10**400, "1", None, True, False])
def test_weights_must_be_finite_and_not_negative(name, weight):
    with pytest.raises(ValueError, match=f"{name}={weight!r}: expected a finite number of at least 0"):
        UnlearningLoss(**{name: weight})


@pytest.mark.parametrize("name", ["forget", "retain", "kl"])
@pytest.mark.parametrize("term", ["CrossEntropy", CrossEntropy, torch.nn.CrossEntropyLoss()])
def test_terms_must_be_loss_terms(name, term):
    with pytest.raises(TypeError, match=rf"{name}=.*is not a LossTerm; pass an instance such as CrossEntropy\(\)"):
        UnlearningLoss(**{name: term})


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
        "forget": {"type": "terms.Brier", "reduction": "sum", "weight": 2.0},
        "retain": {"type": "CrossEntropy", "reduction": "auto"},
        "kl": {"type": "KLDivergence", "reduction": "auto", "direction": "reverse"},
        "gamma": 0.0,
        "lm": {"type": "GradientAscent", "reduction": "mean", "cap": None},
    }


def test_a_record_from_before_there_was_an_lm_term_still_loads():
    saved = {key: value for key, value in UnlearningLoss().to_dict().items() if key not in ("gamma", "lm")}
    assert UnlearningLoss.from_dict(saved) == UnlearningLoss()


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
    with pytest.raises(ValueError, match=r"uses the term 'terms\.Brier', which .*pass the loss yourself"):
        UnlearningLoss.from_dict(saved)
