"""Models made by model_init, once for each training, and searches over their settings."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    arguments,
    assert_same,
    make_collator,
    make_dataset,
    make_unlearner,
    prompt_state,
    rows,
    trainable_model,
)
from small_trainings import logged, trained
from transformers import TrainerCallback

from spul import UnlearningLayers, UnlearningLoss, UnlearningTrainer
from spul.losses import GradientAscent


def test_model_init_trains_what_the_model_itself_would(tmp_path):
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}  # make_unlearner seeds the generator
    for reference in ("cached", "live"):
        given = trained(tmp_path, reference=reference, **settings)
        made = trained(tmp_path, model_init=lambda: make_unlearner(), reference=reference, **settings)
        assert_same(prompt_state(made.model), prompt_state(given.model), rtol=0, atol=0)
        assert logged(made, "kl_loss") == logged(given, "kl_loss")
        assert made.model.spul_config.forget == given.model.spul_config.forget is not None
        assert made.unlearner is made.model


@pytest.mark.parametrize("trainable", ["layers", "lora", "all"])
def test_model_init_makes_any_trainable_anew_for_each_training(tmp_path, trainable):
    made = []

    def model_init():
        made.append(trainable_model(trainable, dtype=torch.float32))
        return made[-1]

    trainer = trained(tmp_path, model_init=model_init, loss=UnlearningLoss())
    first = logged(trainer, "kl_loss")
    trainer.train()
    assert logged(trainer, "kl_loss") == first
    assert trainer.model is made[-1]
    assert len(made) == 3  # one for the checks, one for each training


def test_a_model_of_model_init_is_checked_at_construction(tmp_path):
    with pytest.raises(TypeError, match="expected a SoftPromptUnlearner"):
        trained(tmp_path, model_init=lambda: torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="model is a NoneType"):
        UnlearningTrainer(None, arguments(tmp_path), make_collator(), make_dataset())
    with pytest.raises(ValueError, match="generic_completions=None"):
        trained(tmp_path, model_init=lambda: make_unlearner(loss=UnlearningLoss(forget=GradientAscent())))


def test_a_search_trains_each_trial_with_its_own_values(tmp_path, caplog):
    pytest.importorskip("optuna")
    seen = []

    def model_init(trial):
        alpha = 0.5 if trial is None else trial.suggest_categorical("alpha", [1.0])
        return make_unlearner(loss=UnlearningLoss(alpha=alpha))

    class Seeing(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((trainer._loss.alpha, args.learning_rate, trainer.sampler.batch_size, trainer.sampler.seed))

    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = UnlearningTrainer(
        args=args,
        data_collator=make_collator(),
        train_dataset=make_dataset(),
        eval_dataset={"forget": rows("jane", 5)},
        model_init=model_init,
        forget_fraction=0.5,
        callbacks=[Seeing()],
    )
    values = itertools.count(1)

    def space(trial):
        number = next(values)
        return {
            "learning_rate": trial.suggest_categorical(f"rate {number}", [number / 10]),
            "per_device_train_batch_size": trial.suggest_categorical(f"size {number}", [number]),
            "seed": trial.suggest_categorical(f"seed {number}", [number + 5]),
        }

    search = {"n_trials": 2, "backend": "optuna"}
    best = trainer.hyperparameter_search(space, lambda metrics: metrics["eval_forget_loss"], **search)
    assert seen == [(1.0, 0.1, 1, 6), (1.0, 0.2, 2, 7)]
    assert best.objective > 0
    assert "adds up all metrics" not in caplog.text
    trainer.hyperparameter_search(lambda trial: {}, **search)
    assert "hyperparameter_search adds up all metrics" in caplog.text


def test_layers_train_from_a_search_too(tmp_path):
    trainer = trained(
        tmp_path,
        model_init=lambda: trainable_model("layers", dtype=torch.float32),
        loss=UnlearningLoss(),
        eval_dataset=rows("jane", 4),
    )
    assert isinstance(trainer.model, UnlearningLayers)
    assert trainer.evaluate()["eval_loss"] > 0
