"""Retain as a constraint: the excess over the base, and alpha, which moves to keep it within a budget."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    arguments,
    assert_same,
    build,
    build_unlearner,
    make_answers,
    make_collator,
    make_dataset,
    make_unlearner,
    prompt_state,
    trainable_model,
)
from multipliers import BUDGET, batch_of, plain_alphas, plain_excess
from plain import losses as plain_losses
from plain import row_logits
from transformers import Trainer

from spul import SoftPromptUnlearner, UnlearningLoss
from spul.losses import KLDivergence, RetainMultiplier
from spul.records.fields import check_fields
from spul.training import unlearning_forward, unlearning_method


def output(excess, share=1.0):
    return SimpleNamespace(retain_excess=torch.tensor(excess * share), retain_share=torch.tensor(share))


# ---- the rule ----


@pytest.mark.parametrize(("step_size", "decay"), [(0.02, 0.9), (0.3, 0.0), (1.0, 0.5)])
def test_alpha_moves_as_the_rule_says(step_size, decay):
    generator = torch.Generator().manual_seed(0)
    excesses = (0.05 + 0.1 * torch.randn(60, generator=generator)).tolist()
    excesses[7] = excesses[20] = None
    multiplier = RetainMultiplier(BUDGET, step_size, decay)
    found = []
    for excess in excesses:
        found.append(multiplier.update(output(0.0, 0.0) if excess is None else output(excess)))
        assert found[-1] == multiplier.alpha
    expected = plain_alphas(excesses, 0.7, 0.05, step_size, decay)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[7] == found[6]
    assert len(set(found)) > 10


def test_alpha_rises_while_the_budget_is_exceeded_and_falls_to_zero_and_no_further_while_it_is_not():
    multiplier = RetainMultiplier(BUDGET, step_size=0.1)
    over = [multiplier.update(output(3.0)) for _ in range(10)]
    assert over == pytest.approx([0.7 + 0.1 * i for i in range(1, 11)])  # a bad start moves it no faster
    multiplier.reset()
    assert multiplier.alpha == 0.7
    under = [multiplier.update(output(-1.0)) for _ in range(10)]
    assert under == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0], abs=1e-9)
    assert multiplier.update(output(100.0)) > 0


def test_batches_of_a_step_count_as_one():
    parts, whole = RetainMultiplier(BUDGET), RetainMultiplier(BUDGET)
    parts.add(output(0.3, 0.25), output(0.0, 0.0))
    assert parts.alpha == 0.7
    parts.update(output(0.1, 0.75))
    whole.update(output(0.25 * 0.3 + 0.75 * 0.1))
    assert parts.alpha == pytest.approx(whole.alpha, abs=1e-8)
    assert parts.excess == pytest.approx(0.15, abs=1e-7)


def test_a_step_of_several_processes_is_their_mean():
    multiplier, given = RetainMultiplier(BUDGET, decay=0.0), []

    def reduce(tensor):  # the other process had half of the counts' mean, and no retain row
        given.append(tensor)
        return tensor / 2

    multiplier.update(output(0.2, 2.0), reduce=reduce)
    assert given[0].tolist() == pytest.approx([0.4, 2.0])
    assert multiplier.excess == pytest.approx(0.2)


def test_a_state_goes_through_json_to_the_bit():
    multiplier, again = RetainMultiplier(BUDGET), RetainMultiplier(BUDGET)
    for excess in (0.3, 1 / 3, 0.01):
        multiplier.update(output(excess))
    again.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert (again.alpha, again.excess) == (multiplier.alpha, multiplier.excess)
    assert again.update(output(0.1)) == multiplier.update(output(0.1))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": 10**400},
        {"alpha": 1.0, "excess": "x"},
        {"alpha": True},
        {"alpha": 1.0, "excess": False},
    ],
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match="expected a finite number"):
        RetainMultiplier(BUDGET).load_state_dict(state)


# ---- the excess ----


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_the_excess_of_a_prompt_is_that_of_rows_one_by_one(prompt_type):
    unlearner = build_unlearner(prompt_type=prompt_type, loss=BUDGET)
    batch = batch_of()
    out = unlearner(**batch)
    with torch.no_grad():
        expected = plain_excess(
            lambda ids: row_logits(unlearner, ids), lambda ids: row_logits(unlearner, ids, prompted=False), batch
        )
    assert abs(expected) > 1e-3
    assert out.retain_excess.item() == pytest.approx(expected, rel=1e-6)
    assert out.retain_share == 1
    assert not out.retain_excess.requires_grad
    torch.testing.assert_close(out.loss, out.forget_loss + 0.7 * out.retain_loss)


@pytest.mark.parametrize("trainable", ["layers", "lora", "full"])
def test_the_excess_of_other_trainables_is_that_of_rows_one_by_one(trainable):
    model, base = trainable_model(trainable), build("llama", torch.float64)
    if trainable == "full":
        with torch.no_grad():
            model.lm_head.weight.add_(0.1 * torch.randn(model.lm_head.weight.shape, dtype=torch.float64))
    batch, given = batch_of(), {}
    if trainable == "full":  # from before training
        with torch.no_grad():
            logits = unlearning_forward(base, UnlearningLoss(alpha=0, beta=0), **batch).logits
        given["reference_logits"] = logits[~batch["is_forget"]]
    out = unlearning_forward(model, BUDGET, **batch, alpha=0.25, **given)
    with torch.no_grad():
        expected = plain_excess(lambda ids: model(ids[None]).logits[0], lambda ids: base(ids[None]).logits[0], batch)
    assert abs(expected) > 1e-3
    assert out.retain_excess.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(out.loss, out.forget_loss + 0.25 * out.retain_loss)


def test_the_excess_of_another_retain_term_is_its_own_over_the_base():
    """The KL of the base to itself is 0, so that its excess is the KL, a mean over tokens."""
    batch = batch_of()
    loss = UnlearningLoss(beta=0.0, retain=KLDivergence(), retain_budget=0.1)
    means = UnlearningLoss(beta=0.0, retain=KLDivergence(reduction="mean"))
    found = build_unlearner(loss=loss)(**batch).retain_excess
    torch.testing.assert_close(found, build_unlearner(loss=means)(**batch).retain_loss.detach())


def test_parts_of_a_step_add_up_to_the_excess_of_the_whole():
    unlearner, batch = build_unlearner(loss=BUDGET), batch_of()
    whole = unlearner(**batch)
    counts = torch.tensor([3.0, 3.0])
    parts = [
        unlearner(**{name: value[some] for name, value in batch.items()}, group_counts=counts)
        for some in (slice(0, 4), slice(4, 6))
    ]
    assert [part.retain_share.item() for part in parts] == pytest.approx([1 / 3, 2 / 3])
    torch.testing.assert_close(sum(part.retain_excess for part in parts), whole.retain_excess)


def test_a_batch_of_one_group_is_computed():
    unlearner = build_unlearner(loss=BUDGET)
    forget = unlearner(**batch_of(3))
    assert (forget.retain_excess, forget.retain_share) == (0, 0)
    forget.loss.backward()
    unlearner.multiplier.update(forget)
    assert unlearner.multiplier.state_dict() == {"alpha": 0.7, "excess": None}


@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_alpha_at_zero_still_measures_the_excess(alpha):
    unlearner = build_unlearner(loss=BUDGET)
    out = unlearner(**batch_of(), alpha=alpha)
    torch.testing.assert_close(out.loss, out.forget_loss + alpha * out.retain_loss)
    assert out.retain_excess != 0
    assert out.retain_loss > 0


def test_an_output_of_a_loss_without_a_budget_is_refused():
    out = build_unlearner(loss=UnlearningLoss())(**batch_of())
    for wrong in (out, out.loss):
        with pytest.raises(ValueError, match="an output has no retain_excess: pass the whole output"):
            RetainMultiplier(BUDGET).update(wrong)


# ---- a loop of one's own ----


def test_a_loop_of_ones_own_equals_a_plain_one():
    """Three steps of SGD, the loss and the excess row by row, alpha by the rule."""
    found, twin = (build_unlearner(loss=BUDGET) for _ in range(2))
    batches = [batch_of(dataset=make_answers(3 + i, 3)) for i in range(3)]
    alphas, excesses, used = [], [], [0.7]
    for batch in batches:
        out = found(**batch)
        out.loss.backward()
        torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.5).step()
        found.zero_grad()
        alphas.append(found.multiplier.update(out))

        twin_loss, *_ = plain_losses(twin, batch, alpha=used[-1], beta=0.0)
        with torch.no_grad():
            excesses.append(
                plain_excess(lambda ids: row_logits(twin, ids), lambda ids: row_logits(twin, ids, False), batch)
            )
        twin_loss.backward()
        torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5).step()
        twin.zero_grad()
        used = [0.7, *plain_alphas(excesses, 0.7, 0.05, 0.01, 0.9)]
        torch.testing.assert_close(out.loss, twin_loss)
    assert alphas == pytest.approx(used[1:], abs=1e-7)
    assert len(set(alphas)) == 3
    assert_same(prompt_state(found), prompt_state(twin), rtol=1e-5, atol=1e-7)


def test_a_new_loss_has_a_new_multiplier_and_a_fixed_alpha_none():
    unlearner = build_unlearner(loss=BUDGET)
    unlearner.multiplier.update(output(9.0))
    assert unlearner.multiplier.alpha == pytest.approx(0.71)
    unlearner.loss = UnlearningLoss(alpha=2.0, retain_budget=0.1)
    assert unlearner.multiplier.alpha == 2.0
    unlearner.loss = UnlearningLoss()
    assert unlearner.multiplier is None


def test_a_loop_that_forgets_the_update_is_told_once(tmp_path, caplog):
    unlearner = make_unlearner(loss=BUDGET)
    settings = arguments(tmp_path, max_steps=101, per_device_train_batch_size=1, remove_unused_columns=False)
    with caplog.at_level(logging.WARNING):
        Trainer(unlearner, settings, make_collator(), make_dataset()).train()
    said = [record.message for record in caplog.records if "without an update" in record.message]
    assert said == [
        "100 batches under retain_budget=0.05 without an update: alpha is still 0.7. Call multiplier.update(out) "
        "after each optimizer step, or train with UnlearningTrainer, which does."
    ]


# ---- the record ----


def test_the_budget_is_saved_with_the_prompt_and_trains_on(tmp_path):
    unlearner = make_unlearner(loss=BUDGET)
    unlearner.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "spul_config.json").read_text())["loss"]
    assert (saved["alpha"], saved["retain_budget"]) == (0.7, 0.05)
    assert "within 0.05 nats per token" in (tmp_path / "README.md").read_text()
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert loaded.loss == BUDGET
    assert loaded.multiplier.budget == 0.05


def test_a_loss_without_a_budget_is_recorded_as_before():
    assert "retain_budget" not in UnlearningLoss().to_dict()
    assert UnlearningLoss.from_dict(UnlearningLoss().to_dict()).retain_budget is None


@pytest.mark.parametrize("change", [{"retain_budget": value} for value in (0, -0.1, math.nan, "0.02", True)])
def test_a_budget_out_of_range_is_refused_in_a_loss_and_in_a_record(change):
    with pytest.raises(ValueError, match=r"retain_budget=.*: expected a finite number of nats per token above 0"):
        UnlearningLoss(**change)
    with pytest.raises(ValueError, match=r"loss is .*; expected .*retain_budget, if there is one, above 0"):
        check_fields({"loss": {**UnlearningLoss().to_dict(), **change}}, "here")


# ---- what needs it, and what is refused ----


def test_a_budget_needs_the_reference_of_retain_rows():
    is_forget = torch.tensor([True, False])
    assert BUDGET.needs_reference
    assert BUDGET.rows_needing_reference(is_forget).tolist() == [False, True]
    assert not UnlearningLoss(beta=0.0).needs_reference


def test_a_budget_without_a_retain_term_is_refused():
    with pytest.raises(ValueError, match=r"retain_budget=0\.02 with alpha=0: there is no retain term"):
        UnlearningLoss(alpha=0.0, retain_budget=0.02)
    with pytest.raises(ValueError, match=r"expected .*with an alpha above 0"):
        check_fields({"loss": {**UnlearningLoss(alpha=0.0).to_dict(), "retain_budget": 0.02}}, "here")


@pytest.mark.parametrize("name", ["SPUL", "GA+GD", "NPO+GD", "SimNPO+GD", "EUL"])
def test_methods_with_a_retain_term_take_a_budget(name):
    fixed, found = unlearning_method(name).loss, unlearning_method(name, alpha=2.0, retain_budget=0.02).loss
    assert (found.alpha, found.retain_budget) == (2.0, 0.02)
    assert (found.forget, found.beta, found.kl) == (fixed.forget, fixed.beta, fixed.kl)


@pytest.mark.parametrize("name", ["GA", "RL", "NPO", "SimNPO", "GA+KL", "NPO+KL", "SimNPO+KL"])
def test_methods_without_a_retain_term_refuse_a_budget(name):
    with pytest.raises(ValueError, match=r"retain_budget=0\.02: .* has no retain term"):
        unlearning_method(name, retain_budget=0.02)


def test_what_contradicts_the_loss_is_refused():
    batch = batch_of()
    with pytest.raises(ValueError, match=r"pass alpha=multiplier\.alpha"):
        unlearning_forward(trainable_model("lora"), BUDGET, **batch)
    with pytest.raises(ValueError, match=r"this loss has the fixed alpha=1\.0 and no retain_budget"):
        build_unlearner()(**batch, alpha=0.5)
    with pytest.raises(ValueError, match="has no budget"):
        RetainMultiplier(UnlearningLoss())
    with pytest.raises(ValueError, match="update needs the outputs"):
        RetainMultiplier(BUDGET).update()
    with pytest.raises(FloatingPointError, match="the retain excess of this step is nan"):
        RetainMultiplier(BUDGET).update(output(math.nan))


@pytest.mark.parametrize(
    "settings", [{"step_size": 0}, {"step_size": math.inf}, {"step_size": True}, {"decay": 1.0}, {"decay": "0.9"}]
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}=.*: expected a"):
        RetainMultiplier(BUDGET, **settings)
