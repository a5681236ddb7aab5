"""Modules are walked and read as torch's slower methods do it, and every change is seen."""

import itertools

import pytest
import torch
from helpers import build
from torch import nn

from spul.models.compat_checkpointing import is_checkpointing, switch_checkpointing
from spul.models.compat_modules import (
    all_modules,
    forward_hooks,
    modules_with,
    settings_of,
    weight_versions,
    with_evaluated,
)

FLAG = "gradient_checkpointing"


def shared_and_missing():
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.norm.register_module("nothing", None)
    return model


@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: build("opt"), shared_and_missing])
def test_each_module_is_found_once(make):
    model = make()
    found = all_modules(model)
    assert len(found) == len(set(found))
    assert set(found) == set(model.modules())


def test_attributes_are_found_on_modules_and_on_their_classes():
    class Off(nn.Module):
        gradient_checkpointing = False

    class Asked(Off):
        @property
        def gradient_checkpointing(self):
            return self.training

    off, overridden, asked, none = Off(), Off(), Asked(), nn.Linear(1, 1)
    overridden.gradient_checkpointing = True
    model = nn.ModuleList([off, overridden, asked, none])
    for modules in (model, *model):
        model.train()
        plain = [m for m in modules.modules() if getattr(m, FLAG, None) is not None]
        assert set(modules_with(modules, FLAG)) == set(plain)
        expected = any(getattr(m, FLAG, False) for m in modules.modules())
        assert is_checkpointing(modules) == expected == (modules in (model, overridden, asked))
        assert not is_checkpointing(modules.eval())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3"])
def test_checkpointing_is_seen_on_every_family_while_it_is_on(family):
    base = build(family).train()
    assert not is_checkpointing(base)
    switch_checkpointing(base, "enable")
    assert is_checkpointing(base)
    assert not is_checkpointing(base.eval())
    switch_checkpointing(base.train(), "disable")
    assert not is_checkpointing(base)


def test_versions_are_of_every_parameter_and_buffer_and_change_with_each():
    model = build("gpt2")
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    assert set(weight_versions(model)) == {(t.data_ptr(), t._version) for t in tensors}
    for tensor in tensors:
        before = weight_versions(model)
        with torch.no_grad():
            tensor.add_(0)
        assert weight_versions(model) != before
    before = weight_versions(model)
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight.detach().clone())
    assert weight_versions(model) != before
    with torch.inference_mode():
        inferred = nn.Linear(2, 2)
    assert [version for _, version in weight_versions(inferred)] == [0, 0]


def hook_before(model):
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)


def hook_after(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def other_hook(model):
    model.model.norm._forward_hooks.clear()
    model.model.norm.register_forward_hook(lambda *_: None)


def own_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x


def scaling(model):
    model.model.layers[1].self_attn.scaling *= 2


def new_setting(model):
    model.model.layers[0].input_layernorm.scale = None


def module_replaced(model):
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def config_changed(model):
    model.config.rope_parameters["rope_theta"] = 1.0


def inner_list(model):
    model.model.layers[0].kinds[1] = 3


CHANGES = (
    hook_before,
    hook_after,
    other_hook,
    own_forward,
    scaling,
    new_setting,
    module_replaced,
    config_changed,
    inner_list,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_a_change_of_hook_setting_or_forward_is_seen(change):
    model = build("llama")
    model.model.norm.register_forward_hook(lambda *_: None)
    model.model.layers[0].kinds = [1, 2]
    before = settings_of(model)
    model.train().eval().requires_grad_(False)
    assert settings_of(model) == before, "modes and gradients are no settings"
    change(model)
    assert settings_of(model) != before


def test_a_view_in_evaluation_mode_is_made_only_where_something_trains():
    model = build("llama").train()
    view = with_evaluated(model, "lm_head")
    assert (view.lm_head.training, model.lm_head.training, view.lm_head.weight is model.lm_head.weight) == (0, 1, 1)
    assert with_evaluated(model.eval(), "lm_head") is model


def test_hooks_before_and_after_forwards_are_listed():
    model, seen = build("llama"), []
    for register in (model.lm_head.register_forward_hook, model.model.norm.register_forward_pre_hook):

        def hook(*_):
            return None

        seen.append((register(hook).id, hook))
    assert sorted(forward_hooks(model), key=lambda one: one[0]) == sorted(seen, key=lambda one: one[0])
