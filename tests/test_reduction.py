"""Reduction of a row's token losses: labels are summed, longer answers averaged, unless a term decides otherwise."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from helpers import arguments, make_answers, make_collator, make_unlearner, rows
from plain import losses as plain_losses

from spul import UnlearningLoss, UnlearningTrainer, forget_retain_dataset
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


@dataclass(frozen=True)
class Tagged(CrossEntropy):
    """A cross-entropy with a setting of the user's own."""

    tag: str = ""


class Untagged(CrossEntropy):
    """A cross-entropy without one, and no dataclass."""


@pytest.mark.parametrize("kind", [Tagged, Untagged])
def test_a_subclass_of_cross_entropy_has_its_defaults(kind):
    loss = UnlearningLoss(forget=kind(), retain=kind(), lm=kind())
    plain_loss = UnlearningLoss(forget=CrossEntropy(), retain=CrossEntropy(), lm=CrossEntropy())
    for name in ("forget", "retain", "lm"):
        assert isinstance(getattr(loss, name), kind)
        assert getattr(loss, name).reduction == getattr(plain_loss, name).reduction
    out, expected = (one(LOGITS, LABELS, ~RETAIN).forget_loss for one in (loss, plain_loss))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert UnlearningLoss(forget=kind(reduction="sum")).forget.reduction == "sum"


def test_a_cross_entropy_that_makes_its_labels_unlikely_is_summed_as_gradient_ascent_is():
    class Descending(CrossEntropy):
        makes_unlikely = True

    for term in (GradientAscent(), Descending()):
        assert UnlearningLoss(forget=term).forget.reduction == "sum"
        assert UnlearningLoss(retain=term).retain.reduction == "auto"


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
    batch = make_collator(generic_completions=[" neutral", " neutral film good bad"])([dataset[i] for i in range(9)])
    assert (batch["labels"][~batch["is_forget"]] != -100).sum(1).max() > 3
    assert (batch["labels"][batch["is_forget"]] != -100).sum(1).max() > 3
    for reduction, given in (("auto", None), ("sum", "sum"), ("mean", "mean")):
        term = CrossEntropy(reduction=given)
        loss = UnlearningLoss(forget=term, retain=term, kl=KLDivergence(reduction=given))
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


def test_only_response_terms_in_use_are_averaged_by_length():
    kept = {"retain": CrossEntropy(reduction="sum"), "kl": KLDivergence(reduction="mean")}
    summed = {"forget": GradientAscent(), **kept}
    for loss, names in (
        (UnlearningLoss(), ["forget", "retain", "kl"]),
        (UnlearningLoss(alpha=0), ["forget", "kl"]),
        (UnlearningLoss(beta=0), ["forget", "retain"]),
        (UnlearningLoss(alpha=0, beta=0), ["forget"]),
        (UnlearningLoss(forget=NPO()), ["retain", "kl"]),
        (UnlearningLoss(**summed), []),
        (UnlearningLoss(**{**summed, "forget": SimNPO()}), []),
        (UnlearningLoss(**summed, gamma=0.2, lm=GradientAscent(reduction="auto")), []),
    ):
        assert [*loss.averaged_terms] == names
        assert all(term is getattr(loss, name) for name, term in loss.averaged_terms.items())


# ---- the log ----

LONG = " good bad good bad good"
OTHER = " bad good bad good bad film"


def said_by(folder, caplog, loss, forget_answer=None, retain_answer=None):
    """The messages of a training's log about averaged rows; answers are labels unless given."""
    forget, retain = rows("jane", 4), rows("film", 12)
    if retain_answer is not None:
        retain = retain.map(lambda row: {"completion": retain_answer})
    generic = None if loss.forget.makes_unlikely else [forget_answer or " neutral"]
    if generic is None and forget_answer is not None:
        forget = forget.map(lambda row: {"completion": forget_answer})
    trainer = UnlearningTrainer(
        make_unlearner(loss=loss),
        arguments(folder, max_steps=4),
        make_collator(generic_completions=generic),
        forget_retain_dataset(forget, retain),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    return [record.message for record in caplog.records if "are means over its tokens" in record.message]


SUMS = {"retain": CrossEntropy(reduction="sum"), "kl": KLDivergence(direction="forward", reduction="sum")}


@pytest.mark.parametrize(
    ("loss", "forget_answer", "retain_answer", "terms"),
    [
        (UnlearningLoss(), None, LONG, "the forget, retain and KL losses"),
        (UnlearningLoss(), LONG, None, "the forget, retain and KL losses"),
        (UnlearningLoss(alpha=0, beta=0), LONG, OTHER, "the forget loss"),
        (UnlearningLoss(**SUMS), LONG, OTHER, "the forget loss"),
        (UnlearningLoss(forget=GradientAscent()), LONG, OTHER, "the retain and KL losses"),
        (UnlearningLoss(forget=CrossEntropy(reduction="sum"), beta=0), LONG, OTHER, "the retain loss"),
    ],
)
def test_the_log_says_once_which_terms_average_long_rows(tmp_path, caplog, loss, forget_answer, retain_answer, terms):
    (message,) = said_by(tmp_path, caplog, loss, forget_answer=forget_answer, retain_answer=retain_answer)
    assert f"{terms} of a row with more than 3 tokens are means over its tokens" in message


@pytest.mark.parametrize(
    ("loss", "forget_answer", "retain_answer"),
    [
        (UnlearningLoss(), None, None),
        (UnlearningLoss(alpha=0, beta=0), None, LONG),
        (UnlearningLoss(**SUMS), None, LONG),
        (UnlearningLoss(forget=GradientAscent()), LONG, None),
        (UnlearningLoss(forget=GradientAscent(), **SUMS), LONG, LONG),
    ],
)
def test_no_log_speaks_of_rows_whose_terms_are_not_averaged(tmp_path, caplog, loss, forget_answer, retain_answer):
    assert not said_by(tmp_path, caplog, loss, forget_answer=forget_answer, retain_answer=retain_answer)


def test_the_remedy_in_the_log_is_the_loss_with_sums(tmp_path, caplog):
    loss = UnlearningLoss(beta=0.1, kl=KLDivergence(direction="forward"))
    (message,) = said_by(tmp_path, caplog, loss, retain_answer=LONG)
    assert (
        "UnlearningLoss(..., forget=CrossEntropy(reduction='sum'), retain=CrossEntropy(reduction='sum'), "
        "kl=KLDivergence(reduction='sum', direction='forward'))" in message
    )
