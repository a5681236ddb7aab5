"""Preference terms: DPO against its formula, its limits, and the pairs that an UnlearningLoss makes of rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from terms import IS_FORGET, LABELS, LOGITS, REFERENCE, plain_nll

from spul import UnlearningLoss
from spul.losses import DPO, NPO, CrossEntropy, GradientAscent, SimNPO
from spul.training.methods import unlearning_method

# Rows 0 and 1 are chosen, rows 2 and 3 their rejected partners.
PAIRS = ((0, 2), (1, 3))


def log_ratio(row: int) -> float:
    return sum(plain_nll(REFERENCE, LABELS, row)) - sum(plain_nll(LOGITS, LABELS, row))


@pytest.mark.parametrize("inverse_temperature", [0.1, 2.0])
def test_dpo_equals_the_plain_formula_pair_by_pair(inverse_temperature):
    found = DPO(inverse_temperature=inverse_temperature)(LOGITS, LABELS, REFERENCE).tolist()
    for chosen, rejected in PAIRS:
        odds = math.exp(log_ratio(chosen) - log_ratio(rejected)) ** inverse_temperature
        assert found[chosen] == pytest.approx(2 / inverse_temperature * math.log(1 + 1 / odds))
        assert found[rejected] == 0.0


def test_dpo_whose_chosen_response_has_not_moved_is_npo():
    logits = LOGITS.clone()
    logits[:2] = REFERENCE[:2]
    torch.testing.assert_close(DPO()(logits, LABELS, REFERENCE)[:2], NPO()(LOGITS, LABELS, REFERENCE)[2:])


def test_the_gradient_of_dpo_goes_to_ascent_on_the_rejected_and_descent_on_the_chosen():
    logits, other = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    DPO(inverse_temperature=1e-6)(logits, LABELS, REFERENCE).sum().backward()
    (CrossEntropy()(other[:2], LABELS[:2]).sum() + GradientAscent()(other[2:], LABELS[2:]).sum()).backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_npo_with_either_retain_term_is_the_sum_of_the_plain_terms_of_its_program():
    rows, retained, slots = [0, 2], torch.tensor([False, True]), LABELS[2] != -100  # two response tokens to retain
    forget = 2 / 0.1 * math.log(1 + math.exp(0.1 * log_ratio(0)))
    current, base = LOGITS[2, slots].log_softmax(-1), REFERENCE[2, slots].log_softmax(-1)
    kl = float(F.kl_div(current, base, reduction="sum", log_target=True))  # the program's: of the base to the trained
    mean = sum(plain_nll(LOGITS, LABELS, 2)) / 2

    program = UnlearningLoss(alpha=1.0, beta=0.0, forget=NPO(), retain=CrossEntropy(reduction="mean"))
    for loss, retain in (
        (unlearning_method("NPO+KL").loss, kl),
        (unlearning_method("NPO+GD").loss, 2 * mean),
        (program, mean),
    ):
        needed = loss.rows_needing_reference(~retained)
        found = loss(LOGITS[rows], LABELS[rows], ~retained, REFERENCE[rows][needed])
        assert float(found.loss) == pytest.approx(forget + retain)


def test_an_odd_number_of_rows_is_no_pairs():
    with pytest.raises(ValueError, match="DPO got 3 rows; expected the chosen rows, then as many rejected ones"):
        DPO()(LOGITS[:3], LABELS[:3], REFERENCE[:3])


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, True])
def test_an_inverse_temperature_of_dpo_is_above_zero(value):
    with pytest.raises(ValueError, match=r"inverse_temperature=.*expected a finite number above 0"):
        DPO(inverse_temperature=value)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, True, "1"])
def test_a_margin_of_simnpo_is_not_negative(value):
    with pytest.raises(ValueError, match=r"margin=.*expected a finite number of at least 0"):
        SimNPO(margin=value)


# ---- pairs in the whole loss ----


@pytest.mark.parametrize("order", [[0, 2, 1, 3, 4], [4, 0, 1, 2, 3], [1, 4, 3, 0, 2]])
def test_a_pair_counts_as_one_row_wherever_its_rows_stand(order):
    logits, labels, reference = (torch.cat([x, x[:1]]) for x in (LOGITS, LABELS, REFERENCE))  # row 4 is a retain row
    is_forget = torch.tensor([True, True, True, True, False])[order]
    is_rejected = torch.tensor([False, False, True, True, False])[order]
    loss = UnlearningLoss(alpha=0.5, beta=0.0, forget=DPO())
    out = loss(logits[order], labels[order], is_forget, reference[order][is_forget], is_rejected=is_rejected)
    expected = DPO()(LOGITS, LABELS, REFERENCE)[:2].sum() / 2
    if order.index(1) < order.index(0):  # then the k-th chosen and the k-th rejected row are still the same pairs
        assert order.index(3) < order.index(2)
    torch.testing.assert_close(out.forget_loss, expected)
    assert out.retain_loss.item() == pytest.approx(sum(plain_nll(LOGITS, LABELS, 0)))


def test_pairs_and_terms_that_do_not_fit_are_refused():
    pairs, plain = UnlearningLoss(alpha=0.0, beta=0.0, forget=DPO()), UnlearningLoss(alpha=0.0, beta=0.0)
    every = torch.ones(4, dtype=torch.bool)
    rejected = torch.tensor([False, True, False, True])
    with pytest.raises(ValueError, match=r"got no is_rejected: the collator must make pairs.*pairs=True"):
        pairs(LOGITS, LABELS, every, REFERENCE)
    with pytest.raises(ValueError, match=r"CrossEntropy.* got is_rejected"):
        plain(LOGITS, LABELS, every, is_rejected=rejected)
    with pytest.raises(ValueError, match="1 chosen and 3 rejected forget rows"):
        pairs(LOGITS, LABELS, every, REFERENCE, is_rejected=torch.tensor([True, True, False, True]))
    with pytest.raises(ValueError, match="1 chosen and 1 rejected forget rows, 2 rejected in all"):
        pairs(LOGITS, LABELS, IS_FORGET, REFERENCE[IS_FORGET], is_rejected=torch.tensor([False, True, False, True]))
    with pytest.raises(ValueError, match=r"retain=DPO.* needs pairs of responses, which forget rows have"):
        UnlearningLoss(retain=DPO())
    with pytest.raises(ValueError, match=r"gamma=0\.2 with forget=DPO"):
        UnlearningLoss(forget=DPO(), gamma=0.2)
