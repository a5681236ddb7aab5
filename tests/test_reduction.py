"""Reduction of a row's token losses: labels are summed, free answers of retain rows averaged, unless it is given."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from helpers import arguments, make_answers, make_collator, make_dataset, make_unlearner
from plain import losses as plain_losses

from spul import UnlearningLoss, UnlearningTrainer
from spul.losses import NPO, CrossEntropy, GradientAscent, KLDivergence, LossTerm, SimNPO, token_nll
from spul.training.methods import METHODS, unlearning_method

VOCABULARY = 7
LENGTHS = (1, 2, 3, 4, 6, 12, 0)
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.full((len(LENGTHS), max(LENGTHS)), -100)
for _row, _length in enumerate(LENGTHS):
    LABELS[_row, :_length] = torch.randint(VOCABULARY, (_length,), generator=GENERATOR)
LOGITS = torch.randn(*LABELS.shape, VOCABULARY, dtype=torch.float64, generator=GENERATOR)
REFERENCE = torch.randn(*LABELS.shape, VOCABULARY, dtype=torch.float64, generator=GENERATOR)
RETAIN = torch.zeros(len(LENGTHS), dtype=torch.bool)


def plain(token_losses: list[float], reduction: str) -> float:
    """A row's loss from those of its tokens."""
    if not token_losses:
        return 0.0
    mean = sum(token_losses) / len(token_losses)
    if reduction == "mean":
        return mean
    return sum(token_losses) if reduction == "sum" or len(token_losses) <= 3 else mean


@dataclass(frozen=True)
class Halved(LossTerm):
    """A term of the user's own."""

    factor: float = 0.5

    def token_losses(self, logits, labels, reference_logits=None):
        return self.factor * token_nll(logits, labels)


# ---- rows ----


@pytest.mark.parametrize("reduction", ["sum", "mean", "auto"])
@pytest.mark.parametrize("kind", [CrossEntropy, KLDivergence, Halved])
def test_a_rows_loss_is_the_plain_reduction_of_its_tokens(kind, reduction):
    term = kind(reduction=reduction)
    tokens = term.token_losses(LOGITS, LABELS, REFERENCE)
    expected = [plain(tokens[row, :length].tolist(), reduction) for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(term(LOGITS, LABELS, REFERENCE), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [CrossEntropy, KLDivergence])
def test_labels_of_up_to_three_tokens_have_the_bits_of_a_sum(kind, dtype):
    found = []
    for reduction in ("sum", "auto"):
        logits = LOGITS[:3].to(dtype).requires_grad_()
        rows = kind(reduction=reduction)(logits, LABELS[:3], REFERENCE[:3].to(dtype))
        rows.sum().backward()
        found.append((rows.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_row_of_more_than_three_tokens_weighs_as_one_token():
    logits = torch.zeros(6, 6, VOCABULARY)
    labels = torch.where(torch.arange(6) <= torch.arange(6)[:, None], 1, -100)
    in_tokens = CrossEntropy(reduction="auto")(logits, labels) / token_nll(logits[:1, :1], labels[:1, :1])[0, 0]
    assert in_tokens.tolist() == pytest.approx([1, 2, 3, 1, 1, 1])


# ---- places ----


def test_a_term_takes_the_default_of_its_place():
    loss = UnlearningLoss(
        forget=Halved(), retain=Halved(factor=2.0), kl=KLDivergence(direction="forward"), lm=Halved()
    )
    assert [getattr(loss, name).reduction for name in ("forget", "retain", "kl", "lm")] == [
        "sum",
        "auto",
        "auto",
        "sum",
    ]
    assert (loss.retain.factor, loss.kl.direction) == (2.0, "forward")
    assert UnlearningLoss(retain=CrossEntropy(), kl=KLDivergence()) == UnlearningLoss()
    assert UnlearningLoss().forget == CrossEntropy(reduction="auto") == UnlearningLoss(forget=CrossEntropy()).forget
    assert UnlearningLoss(forget=NPO()).forget.reduction == "sum"


def test_the_term_given_is_not_changed():
    term = KLDivergence()
    UnlearningLoss(forget=term, kl=term)
    assert term.reduction is None
    torch.testing.assert_close(
        term(LOGITS, LABELS, REFERENCE), KLDivergence(reduction="sum")(LOGITS, LABELS, REFERENCE), rtol=0, atol=0
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "auto"])
def test_a_reduction_that_is_given_stays(reduction):
    terms = {name: CrossEntropy(reduction=reduction) for name in ("forget", "retain")}
    loss = UnlearningLoss(**terms, kl=KLDivergence(reduction=reduction))
    assert {loss.forget.reduction, loss.retain.reduction, loss.kl.reduction} == {reduction}
    assert UnlearningLoss.from_dict(loss.to_dict()) == loss


def test_long_rows_are_averaged_generic_answers_included():
    out = UnlearningLoss()(LOGITS, LABELS, RETAIN, REFERENCE)
    nll, kl = token_nll(LOGITS, LABELS), KLDivergence().token_losses(LOGITS, LABELS, REFERENCE)
    for found, tokens in ((out.retain_loss, nll), (out.kl_loss, kl)):
        rows = [plain(tokens[row, :length].tolist(), "auto") for row, length in enumerate(LENGTHS)]
        assert found.item() == pytest.approx(sum(rows) / len(LENGTHS))
    forget = UnlearningLoss()(LOGITS, LABELS, ~RETAIN).forget_loss
    assert forget.item() == pytest.approx(out.retain_loss.item())
    summed = UnlearningLoss(forget=CrossEntropy(reduction="sum"))(LOGITS, LABELS, ~RETAIN).forget_loss
    assert summed.item() == pytest.approx(nll.sum().item() / len(LENGTHS))


def test_a_batch_of_labels_and_answers_is_that_of_rows_one_by_one():
    """Under a prompt, with response tokens of rows of many lengths in one batch."""
    dataset = make_answers(3, 6)
    batch = make_collator()([dataset[i] for i in range(9)])
    assert (batch["labels"][~batch["is_forget"]] != -100).sum(1).max() > 3
    for reduction, given in (("auto", None), ("sum", "sum"), ("mean", "mean")):
        loss = UnlearningLoss(retain=CrossEntropy(reduction=given), kl=KLDivergence(reduction=given))
        unlearner = make_unlearner(loss=loss)
        out = unlearner(**batch)
        with torch.no_grad():
            expected = plain_losses(unlearner, batch, reduction=reduction)
        for found, wanted in zip((out.loss, out.forget_loss, out.retain_loss, out.kl_loss), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)


# ---- records and methods ----


def test_a_record_keeps_the_reduction_that_it_was_trained_with():
    saved = UnlearningLoss().to_dict()
    for name in ("retain", "kl"):
        assert saved[name]["reduction"] == "auto"
        saved[name] = {**saved[name], "reduction": "sum"}  # as records before had it
    loss = UnlearningLoss.from_dict(saved)
    assert (loss.retain.reduction, loss.kl.reduction) == ("sum", "sum")


SUMMED = ("GA", "RL", "GA+KL", "GA+GD", "NPO", "NPO+KL", "NPO+GD", "SimNPO+KL", "SimNPO+GD", "EUL")


@pytest.mark.parametrize("name", METHODS)
def test_published_methods_keep_their_reductions(name):
    """The first ones sum, as printed; the programs of those on free answers average over tokens."""
    loss = unlearning_method(name).loss
    if name in SUMMED:
        assert loss.forget.reduction == ("mean" if "SimNPO" in name else "sum")
    if name != "SPUL":
        assert loss.alpha == 0 or loss.retain.reduction == ("sum" if name in SUMMED else "mean")
        assert loss.beta == 0 or loss.kl.reduction == "sum"
    assert loss.lm.reduction == "mean"


def test_only_terms_in_use_count_as_averaging():
    assert UnlearningLoss(alpha=0).averages_long_rows
    assert UnlearningLoss(beta=0).averages_long_rows
    assert not UnlearningLoss(alpha=0, beta=0).averages_long_rows
    for forget in (GradientAscent(), NPO(), SimNPO()):
        sums = {"retain": CrossEntropy(reduction="sum"), "kl": KLDivergence(reduction="mean")}
        assert not UnlearningLoss(forget=forget, **sums).averages_long_rows


# ---- the log ----


@pytest.mark.parametrize(
    ("dataset", "loss", "times"),
    [
        (make_answers(4, 12), UnlearningLoss(), 1),
        (make_dataset(4, 12), UnlearningLoss(), 0),
        (make_answers(4, 12), UnlearningLoss(beta=0, retain=CrossEntropy(reduction="sum")), 0),
    ],
)
def test_answers_of_many_tokens_are_said_to_be_averaged_once(tmp_path, caplog, dataset, loss, times):
    trainer = UnlearningTrainer(make_unlearner(loss=loss), arguments(tmp_path, max_steps=4), make_collator(), dataset)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record.message for record in caplog.records if "are means over its tokens" in record.message]
    assert len(said) == times
    assert all("pass a reduction" in message for message in said)
