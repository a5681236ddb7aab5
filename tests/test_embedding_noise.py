"""NEFTune's noise on input embeddings: in the trained pass alone, of the published size, gone with its training."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import FAMILIES, make_unlearner, trainable_model
from small_trainings import logged, trained
from transformers import TrainerCallback

from spul import UnlearningLoss


class Alone(TrainerCallback):
    """Draws the same noise at every step, whatever else drew from the generator."""

    def on_step_begin(self, *args, **kwargs):
        torch.manual_seed(7)


def test_noise_is_in_the_trained_pass_alone_so_that_both_references_agree(tmp_path):
    terms = {}
    for alpha, reference in itertools.product((None, 100.0), ("cached", "live")):
        trainer = trained(tmp_path, reference=reference, neftune_noise_alpha=alpha, callbacks=[Alone()])
        terms[alpha, reference] = logged(trainer, "kl_loss")
        assert not trainer.model.get_base_model().get_input_embeddings()._forward_hooks
    assert terms[100.0, "live"] == pytest.approx(terms[100.0, "cached"], rel=1e-4)
    assert terms[100.0, "live"][0] > 1.1 * terms[None, "live"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_reaches_every_family(tmp_path, family):
    losses = [
        logged(trained(tmp_path, make_unlearner(family=family), neftune_noise_alpha=alpha, max_steps=1))
        for alpha in (None, 5.0)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("trainable", ["layers", "lora", "all"])
def test_noise_is_uniform_and_of_the_published_size(tmp_path, trainable):
    model, seen = trainable_model(trainable, dtype=torch.float32), []
    base = model.get_base_model() if trainable != "all" else model
    table = base.get_input_embeddings()

    class Looking(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not seen:
                ids = torch.arange(60).reshape(2, 30)
                table.train()
                seen.append(table(ids).detach() - table.weight[ids].detach())
                with torch.no_grad():
                    seen.append(table(ids) - table.weight[ids])
                table.eval()
                seen.append(table(ids).detach() - table.weight[ids].detach())

    trained(tmp_path, model, loss=UnlearningLoss(), neftune_noise_alpha=5.0, callbacks=[Looking()], max_steps=1)
    size = 5.0 / (30 * 32) ** 0.5
    assert 0.9 * size < seen[0].abs().max() <= size * 1.0001
    assert seen[0].std() == pytest.approx(size / 3**0.5, rel=0.1)
    assert not seen[1].any()
    assert not seen[2].any()


def test_noise_ends_with_a_training_that_fails(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = make_unlearner()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, neftune_noise_alpha=5.0, callbacks=[Failing()])
    assert not model.get_base_model().get_input_embeddings()._forward_hooks


def test_noise_reaches_a_compiled_model_and_ends_with_its_training(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "neftune_noise_alpha": 5.0}
    trainer = trained(tmp_path, **settings)
    plain = trained(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert logged(trainer) != logged(plain)
    assert not trainer.model.get_base_model().get_input_embeddings()._forward_hooks


def test_noise_reaches_a_model_that_was_compiled_without(tmp_path):
    model = make_unlearner()
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "learning_rate": 0.0}
    plain, again, noisy = (
        logged(trained(tmp_path, model, **settings, **more)) for more in ({}, {}, {"neftune_noise_alpha": 5.0})
    )
    assert plain == again != noisy
