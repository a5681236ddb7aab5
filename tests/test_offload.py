"""A base whose layers wait on disk or in memory (`device_map`) trains, saves and reloads as a whole one."""

import pytest
import torch
from helpers import CONFIGS, assert_same, build, make_collator, make_dataset, make_trainer, prompt_state, rows, scored
from transformers import AutoModelForCausalLM

from spul import SoftPromptUnlearner

STEPS = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.5, "weight_decay": 0.0, "learning_rate": 0.1}
STEPS |= {"save_strategy": "steps", "save_steps": 1, "reference": "live"}
MAP = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAP |= {"model.layers.0": "disk", "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def offloaded(folder, offload):
    model = load(folder, device_map=MAP, offload_folder=offload)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    # PEFT takes the word "cpu" for offloading, and asks for a device that is none: with a GPU there is one.
    main = torch.device("cpu")
    model.hf_device_map = {name: main if where == "cpu" else where for name, where in model.hf_device_map.items()}
    return model


def trained(base, prompt_type, folder, resume=None):
    torch.manual_seed(1)
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type]())
    trainer = make_trainer(folder, unlearner=unlearner, **STEPS)
    trainer.train(resume)
    return unlearner


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_an_offloaded_base_makes_the_steps_of_a_whole_one(saved, tmp_path, prompt_type):
    whole = trained(load(saved), prompt_type, tmp_path / "whole")
    other = trained(offloaded(saved, tmp_path / "disk"), prompt_type, tmp_path / "other")
    assert_same(prompt_state(whole), prompt_state(other), rtol=0, atol=1e-5)
    checkpoint = tmp_path / "other" / "checkpoint-1"
    resumed = trained(offloaded(saved, tmp_path / "disk"), prompt_type, tmp_path / "other", str(checkpoint))
    assert_same(prompt_state(other), prompt_state(resumed), rtol=0, atol=1e-6)
    loaded = SoftPromptUnlearner.from_pretrained(
        offloaded(saved, tmp_path / "disk"), tmp_path / "other" / "checkpoint-2", is_trainable=True
    )
    assert_same(prompt_state(other), prompt_state(loaded), rtol=0, atol=0)
    assert scored(loaded, rows("jane", 5)) == pytest.approx(scored(whole, rows("jane", 5)), abs=1e-4)


def test_a_cached_reference_of_an_offloaded_base_is_refused_with_the_way_out(saved, tmp_path):
    unlearner = SoftPromptUnlearner(offloaded(saved, tmp_path / "disk"), CONFIGS["prompt_tuning"]())
    with pytest.raises(ValueError, match="reference='live'"):
        make_trainer(tmp_path, unlearner=unlearner, dataset=make_dataset(), collator=make_collator()).train()
