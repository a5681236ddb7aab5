"""A retain budget in the trainer: alpha is that of a plain loop, resumed to the bit, and the budget holds."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from helpers import (
    arguments,
    assert_same,
    build,
    make_answers,
    make_collator,
    make_dataset,
    make_unlearner,
    trainable_model,
)
from multipliers import BUDGET, batch_of, plain_alphas, plain_excess
from plain import row_logits

from spul import UnlearningLoss, UnlearningTrainer
from spul.losses import GradientAscent
from spul.models.noise import zero_dropout

TRAINABLES = ("prompt", "layers", "lora", "full")


def constrained(folder, trainable, loss=BUDGET, dataset=None, reference="cached", **settings):
    """A trainer of any trainable; its answers have one token or many."""
    torch.manual_seed(0)
    if trainable == "prompt":
        model = make_unlearner(loss=loss)
    else:
        model = trainable_model(trainable, dtype=torch.float32)
        zero_dropout(model)
    return UnlearningTrainer(
        model,
        arguments(folder, **settings),
        make_collator(),
        make_answers(8, 12) if dataset is None else dataset,
        loss=None if trainable == "prompt" else loss,
        reference=reference,
    )


def trained_part(trainer):
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer):
    return [(e["step"], e["alpha"], e["retain_excess"], e["loss"]) for e in trainer.state.log_history if "alpha" in e]


@pytest.mark.parametrize("trainable", TRAINABLES)
def test_resuming_gives_the_bits_of_a_run_that_never_stopped(tmp_path, trainable):
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4}
    whole = constrained(tmp_path / "whole", trainable, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    again = constrained(tmp_path / "cut", trainable, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7
    assert_same(trained_part(again), trained_part(whole), rtol=0, atol=0)
    assert logged(again) == logged(whole)
    assert len({alpha for _, alpha, *_ in logged(whole)}) == 7
    assert again.multiplier.state_dict() == whole.multiplier.state_dict()


@pytest.mark.parametrize("trainable", TRAINABLES)
def test_a_step_is_the_same_however_it_is_cut_up(tmp_path, trainable):
    steps = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}
    whole = constrained(tmp_path, trainable, per_device_train_batch_size=8, **steps)
    parts = constrained(tmp_path, trainable, per_device_train_batch_size=2, gradient_accumulation_steps=4, **steps)
    for trainer in (whole, parts):
        trainer.train()
    assert_same(trained_part(parts), trained_part(whole), rtol=1e-4, atol=1e-6)
    for one, other in zip(logged(whole), logged(parts), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_trainers_alpha_is_that_of_a_plain_loop_over_its_batches(tmp_path):
    """Also that the cached reference gives the base's loss."""
    seen = []

    class Noting(UnlearningTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                excess = plain_excess(
                    lambda ids: row_logits(model, ids), lambda ids: row_logits(model, ids, False), inputs
                )
            seen.append((excess, inputs["alpha"].item()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = arguments(tmp_path, max_steps=4, learning_rate=0.1)
    trainer = Noting(make_unlearner(loss=BUDGET), settings, make_collator(), make_answers(8, 12))
    trainer.multiplier.step_size = 0.1
    trainer.train()
    expected = plain_alphas([excess for excess, _ in seen], 0.7, 0.05, 0.1, 0.9)
    assert [alpha for _, alpha in seen] == pytest.approx([0.7, *expected[:-1]], abs=1e-5)
    assert [alpha for _, alpha, *_ in logged(trainer)] == pytest.approx(expected, abs=1e-5)
    assert trainer.multiplier is trainer.model.multiplier


def test_the_live_reference_moves_alpha_as_the_cached_one(tmp_path):
    found = [constrained(tmp_path, "prompt", reference=mode, max_steps=3) for mode in ("cached", "live")]
    for trainer in found:
        trainer.train()
    for one, other in zip(*map(logged, found), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("trainable", ["prompt", "full"])
def test_settings_of_the_multiplier_hold_for_every_model_of_model_init(tmp_path, trainable):
    is_prompt = trainable == "prompt"
    trainer = UnlearningTrainer(
        None,
        arguments(tmp_path, max_steps=2),
        make_collator(),
        make_answers(4, 4),
        model_init=lambda: make_unlearner(loss=BUDGET) if is_prompt else build("llama"),
        loss=None if is_prompt else BUDGET,
    )
    trainer.multiplier.step_size = 0.3
    for _ in range(2):
        trainer.train()
        assert trainer.multiplier.settings() == {"step_size": 0.3, "decay": 0.9}
    assert abs(logged(trainer)[0][1] - 0.7) > 0.05


def test_settings_that_model_init_gives_a_prompt_are_its_own(tmp_path):
    made = iter((0.1, 0.2))

    def unlearner():
        found = make_unlearner(loss=BUDGET)
        found.multiplier.step_size = next(made)
        return found

    steps = arguments(tmp_path, max_steps=1)
    trainer = UnlearningTrainer(None, steps, make_collator(), make_answers(4, 4), model_init=unlearner)
    assert trainer.multiplier.step_size == 0.1
    trainer.multiplier.decay = 0.5
    trainer.train()
    assert trainer.multiplier.settings() == {"step_size": 0.2, "decay": 0.5}


def test_a_loss_that_replaces_the_prompts_is_trained_under_its_own_alpha_and_budget(tmp_path):
    """As a trainer that had the loss from the start trains."""
    other = UnlearningLoss(alpha=2.0, beta=0.3, retain_budget=0.5)
    found = []
    for first in (other, BUDGET, UnlearningLoss()):
        trainer = constrained(tmp_path, "prompt", first, max_steps=2)
        if first is not other:
            trainer.model.loss = other
        trainer.train()
        assert trainer.multiplier.loss is trainer.model.loss
        found.append(logged(trainer))
    assert len(found[0]) == 2
    assert found[1] == found[2] == found[0]
    trainer.model.loss = UnlearningLoss()
    trainer.train()
    assert trainer.multiplier is None


def test_training_anew_starts_alpha_anew(tmp_path):
    trainer = constrained(tmp_path, "prompt", max_steps=2)
    starts = []
    for _ in range(2):
        trainer.train()
        starts.append(round(abs(logged(trainer)[0][1] - 0.7), 6))
    assert max(starts) <= 0.01


def test_a_checkpoint_without_a_multiplier_says_that_alpha_starts_again(tmp_path, caplog):
    steps = {"save_strategy": "steps", "save_steps": 1}
    constrained(tmp_path, "prompt", max_steps=1, **steps).train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RetainMultiplier"]
    path.write_text(json.dumps(state))
    again = constrained(tmp_path, "prompt", max_steps=2, **steps)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "the checkpoint holds no multiplier: alpha starts at 0.7 again" in caplog.text


def test_a_fixed_alpha_logs_none_and_outputs_no_excess(tmp_path):
    trainer = constrained(tmp_path, "prompt", UnlearningLoss(), max_steps=1)
    trainer.train()
    assert trainer.multiplier is None
    assert not any({"alpha", "retain_excess"} & set(entry) for entry in trainer.state.log_history)
    assert "retain_excess" not in trainer.model(**batch_of())
    assert "RetainMultiplier" not in trainer.state.stateful_callbacks


def test_forgetting_is_held_within_the_budget(tmp_path):
    """Ascent without a bound ruins the retain rows under a fixed alpha, and not under the constraint."""
    excess = []
    for budget in (None, 0.1):
        loss = UnlearningLoss(alpha=0.05, beta=0.0, forget=GradientAscent(cap=12.0), retain_budget=budget)
        trainer = UnlearningTrainer(
            make_unlearner("prefix_tuning", loss=loss),
            arguments(tmp_path, max_steps=150, learning_rate=0.03, per_device_train_batch_size=16),
            make_collator(generic_completions=None),
            make_dataset(8, 8),
        )
        if budget:
            trainer.multiplier.step_size = 0.1
        trainer.train()
        rows = make_collator(generic_completions=None)([make_dataset(8, 8)[i] for i in range(8, 16)])
        trainer.model.loss = UnlearningLoss(retain_budget=0.1)
        with torch.no_grad():
            excess.append(trainer.model(**rows).retain_excess.item())
    assert excess[0] > 0.5
    assert excess[1] < 0.2
