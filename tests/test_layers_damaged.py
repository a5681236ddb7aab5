"""Damaged and foreign folders of unlearning layers: refused, and the base is as before."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import build, stirred
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from spul import UnlearningLayers

WEIGHTS, CONFIG = "unlearning_layers.safetensors", "unlearning_layers.json"


def rewrite(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder, change, name=WEIGHTS):
    save_file(change(load_file(folder / name)), folder / name)
    rewrite(folder / "spul_config.json", weights_sha256=None)


def with_first(state, value):
    next(iter(state.values())).view(-1)[0] = value
    return state


DAMAGES = {
    "other keys": lambda f: retensor(f, lambda s: {f"x.{k}": v for k, v in s.items()}),
    "one key less": lambda f: retensor(f, lambda s: dict(list(s.items())[1:])),
    "other shape": lambda f: retensor(f, lambda s: {k: v[:1].clone() for k, v in s.items()}),
    "NaN": lambda f: retensor(f, lambda s: with_first(s, float("nan"))),
    "int8": lambda f: retensor(f, lambda s: {k: v.to(torch.int8) for k, v in s.items()}),
    "complex": lambda f: retensor(f, lambda s: {k: v.to(torch.complex64) for k, v in s.items()}),
    "half the bytes": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:300]),
    "Gram matrix NaN": lambda f: retensor(f, lambda s: with_first(s, float("nan")), "gram_matrices.safetensors"),
    "Gram matrix of another projection": lambda f: retensor(
        f, lambda s: {f"x.{k}": v for k, v in s.items()}, "gram_matrices.safetensors"
    ),
    "record wrong": lambda f: rewrite(f / "spul_config.json", generic_completions=5),
    "config a list": lambda f: (f / CONFIG).write_text("[]"),
    **{
        f"{name} {value!r}": lambda f, name=name, value=value: rewrite(f / CONFIG, **{name: value})
        for name, values in {
            "num_requests": (-5, 0, 1.5, "1", True, None),
            "reduction": (1e-9, 5e-324, 2, 64, "4", None, True),
            "activation": (5, [], "nothing"),
            "target_modules": ("mlp", [5], [], ["nothing"]),
            "init_seed": ("0", 0.5),
            "train_down": ("yes", 1),
        }.items()
        for value in values
    },
}


def state_of(model):
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        [value for module in model.modules() for key, value in vars(module).items() if "drop" in key],
        [len(module._forward_hooks) for module in model.modules()],
    )


@pytest.fixture
def folder(tmp_path):
    layers = stirred(build("llama"))
    layers.gram_matrices = {
        name.removesuffix(".weight"): torch.eye(value.shape[1] + 1)
        for name, value in layers.layers_state().items()
        if name.endswith(".weight")
    }
    layers.save_pretrained(tmp_path / "layers")
    return tmp_path / "layers"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_changes_neither_base_nor_layers(folder, damage):
    base, live = build("llama").train(), stirred(build("llama"), seed=2)
    DAMAGES[damage](folder)
    before, weights = state_of(base), {k: v.clone() for k, v in live.layers_state().items()}
    with pytest.raises(ValueError, match=r"\w+"):
        UnlearningLayers.from_pretrained(base, folder)
    assert state_of(base) == before
    record = live.spul_config
    with pytest.raises(ValueError, match=r"\w+"):
        live.load_checkpoint(folder)
    assert all(torch.equal(weights[name], value) for name, value in live.layers_state().items())
    assert live.spul_config is record


def test_other_weights_under_a_record_are_refused_and_older_records_accepted(tmp_path, folder):
    other = stirred(build("llama"), seed=2)
    other.save_pretrained(tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="weights_sha256 in"):
        UnlearningLayers.from_pretrained(build("llama"), folder)
    rewrite(folder / "spul_config.json", weights_sha256=None)
    loaded = UnlearningLayers.from_pretrained(build("llama"), folder)
    assert all(torch.equal(value, other.layers_state()[name]) for name, value in loaded.layers_state().items())


def test_a_second_save_replaces_the_digest_too(folder):
    stirred(build("llama"), seed=2).save_pretrained(folder)
    assert "replaced_weights_sha256" not in json.loads((folder / "spul_config.json").read_text())
    UnlearningLayers.from_pretrained(build("llama"), folder)


def test_lora_layers_inside_a_base_are_refused(folder):
    base = build("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), base)
    before = state_of(base)
    for load in (lambda: UnlearningLayers(base), lambda: UnlearningLayers.from_pretrained(base, folder)):
        with pytest.raises(TypeError, match=r"layers inside.*merge_and_unload"):
            load()
    assert state_of(base) == before
