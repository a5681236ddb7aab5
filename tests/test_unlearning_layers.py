"""Unlearning layers: where they sit, that they begin as nothing and leave nothing, their folder and back."""

from __future__ import annotations

import copy
import json
import threading
import warnings

import pytest
import torch
from helpers import SMALL_LAYERS, build, stirred
from peft import LoraConfig, get_peft_model
from torch import nn

from spul import UnlearningLayers, UnlearningLayersConfig, UnlearningLoss, unlearning_forward
from spul.layers import checkpoint as files
from spul.layers.bottleneck import feed_forward_blocks
from spul.losses import NPO, KLDivergence
from spul.models.compat_checkpointing import is_checkpointing

IDS = torch.tensor([[5, 9, 30, 7, 11, 2], [8, 4, 66, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


class Twin(nn.Module):
    """A feed-forward block with a bottleneck behind it, written out."""

    def __init__(self, block, layer):
        super().__init__()
        self.block, self.layer = block, layer

    def forward(self, *args, **kwargs):
        h = self.block(*args, **kwargs)
        inner = torch.relu(h @ self.layer.down.weight.T + self.layer.down.bias)
        return h + inner @ self.layer.up.weight.T + self.layer.up.bias


def test_the_layers_begin_as_the_identity_and_leave_no_trace(family):
    model = build(family).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    base = copy.deepcopy(model).eval()
    expected = base(IDS, attention_mask=MASK).logits

    layers = UnlearningLayers(model, SMALL_LAYERS).eval()
    assert torch.equal(layers(input_ids=IDS, attention_mask=MASK).logits, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    assert layers.remove() is model
    model.train()
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        kept = {key: value for key, value in attributes[name].items() if "drop" in key or key == "p"}
        assert {key: vars(module)[key] for key in kept} == kept, name


def test_a_layer_takes_the_feed_forward_blocks_output_before_the_residual(family):
    model = build(family, torch.float64)
    twin = copy.deepcopy(model)
    layers = stirred(model)
    for name, layer in zip(layers.block_names, layers.layers, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, Twin(twin.get_submodule(name), copy.deepcopy(layer)))
    got = layers(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    expected = twin(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    torch.testing.assert_close(got, expected)
    with layers.disable_adapter():
        plain = layers(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    assert (got - plain).abs().max() > 1e-3


def test_switched_off_the_layers_are_the_base_also_when_it_generates():
    model = build("llama")
    expected = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    layers = stirred(model)
    assert not torch.equal(layers.generate(IDS[:1], max_new_tokens=5, do_sample=False), expected)
    with layers.disable_adapter():
        assert torch.equal(layers.generate(IDS[:1], max_new_tokens=5, do_sample=False), expected)
    assert layers.enabled
    layers.enabled = False
    assert torch.equal(layers.generate(IDS[:1], max_new_tokens=5, do_sample=False), expected)


def test_the_default_is_about_half_a_percent_of_a_usual_models_blocks():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    layers = UnlearningLayers(model)
    share = sum(p.numel() for p in layers.layers.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.004 < share < 0.006


def test_only_the_layers_learn_and_the_model_as_it_was_is_compared_with():
    model = build("qwen3", torch.float64)
    expected = model(IDS).logits.detach()
    layers = stirred(model)
    labels = torch.tensor([[-100] * 4 + [11, 2], [-100] * 2 + [66, 12, -100, -100]])
    loss = UnlearningLoss(forget=NPO(), kl=KLDivergence(direction="forward"))
    batch = {"input_ids": IDS, "labels": labels, "is_forget": torch.tensor([False, True]), "attention_mask": MASK}
    out = unlearning_forward(layers, loss, **batch)
    out.loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in layers.layers.parameters())
    frozen, learned = expected[0, 3:5].log_softmax(-1), layers(IDS).logits[0, 3:5].log_softmax(-1)
    torch.testing.assert_close(out.kl_loss, (frozen.exp() * (frozen - learned)).sum())


def test_a_bfloat16_base_gets_float32_layers():
    model = build("gpt2", torch.bfloat16)
    layers = stirred(model)
    assert {p.dtype for p in layers.layers.parameters()} == {torch.float32}
    assert layers(IDS).logits.dtype == torch.bfloat16


def test_saved_layers_load_onto_their_base(tmp_path, family):
    layers = stirred(build(family))
    up, down = (f"{layers.block_names[0]}.{kind}" for kind in ("up", "down"))
    layers.gram_matrices = {up: torch.eye(9, dtype=torch.float64), down: torch.eye(33, dtype=torch.float64)}
    expected = layers(input_ids=IDS, attention_mask=MASK).logits
    layers.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = UnlearningLayers.from_pretrained(build(family), tmp_path)
    assert torch.equal(loaded(input_ids=IDS, attention_mask=MASK).logits, expected)
    assert loaded.layers_config == SMALL_LAYERS
    assert loaded.gram_matrices.keys() == {up, down}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    trainable = UnlearningLayers.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for parameter in trainable.layers.parameters())
    assert not trainable.gram_matrices, "what was gathered is not of the layers as they will be"


def test_the_folder_holds_safetensors_and_words_and_no_old_gram_matrices(tmp_path):
    layers = stirred(build("llama"))
    layers.gram_matrices = {"a": torch.eye(3, dtype=torch.float64)}
    layers.save_pretrained(tmp_path)
    layers.gram_matrices = {}
    layers.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "spul_config.json",
        "unlearning_layers.json",
        "unlearning_layers.safetensors",
    ]
    assert json.loads((tmp_path / "unlearning_layers.json").read_text()) == {
        "reduction": 4,
        "activation": "relu",
        "target_modules": None,
        "init_seed": 0,
        "train_down": True,
        "num_requests": 1,
    }
    card = (tmp_path / "README.md").read_text()
    assert "do not delete anything" in card
    assert "reduction 4, 1,104 parameters" in card


def test_other_weights_are_noticed(tmp_path):
    stirred(build("llama")).save_pretrained(tmp_path)
    other = build("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    with pytest.warns(UserWarning, match="layers in .* were trained on other weights"):
        UnlearningLayers.from_pretrained(other, tmp_path)


def test_layers_of_another_model_are_refused_and_leave_the_base_alone(tmp_path):
    stirred(build("llama")).save_pretrained(tmp_path)
    other = build("llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"do not fit this base's layers, such as .*expected \(16,\), found \(8,\)"):
        UnlearningLayers.from_pretrained(other, tmp_path)
    assert not any(module._forward_hooks for module in other.modules())
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no unlearning layers"):
        UnlearningLayers.from_pretrained(other, empty)


def test_pushing_makes_the_repository_and_uploads_the_folder(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["private"] = private
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = sorted(path.name for path in files.Path(folder_path).iterdir())
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(files, "HfApi", Api)
    address = stirred(build("opt")).push_to_hub("me/forgets", private=True, token="t")
    assert address == "https://hub/me/forgets/commit/1"
    assert seen["private"] is True
    assert "unlearning_layers.safetensors" in seen["files"]


def test_blocks_of_an_unknown_family_are_found_by_their_names():
    model = build("llama")
    assert feed_forward_blocks(model, ("down_proj",)) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    named = UnlearningLayers(model, UnlearningLayersConfig(reduction=4, target_modules=["down_proj"]))
    assert len(named.layers) == 2
    named.remove()
    with pytest.raises(ValueError, match="has no module whose name ends in experts"):
        UnlearningLayers(model, UnlearningLayersConfig(target_modules=("experts",)))


def test_a_module_that_returns_no_hidden_states_is_named():
    layers = UnlearningLayers(build("llama"), UnlearningLayersConfig(reduction=4, target_modules=("self_attn",)))
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn returns tuple, not hidden states of the width 32"):
        layers(IDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 0}, "reduction=0: expected a number above 0"),
        ({"reduction": float("inf")}, "reduction=inf"),
        ({"reduction": True}, "reduction=True"),
        ({"activation": "relux"}, "activation='relux' is not known"),
        ({"target_modules": "mlp"}, "target_modules='mlp': expected name endings of modules"),
        ({"target_modules": ()}, "target_modules="),
    ],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnlearningLayersConfig(**arguments)


def test_a_base_takes_one_set_of_layers_and_must_be_a_bare_causal_lm():
    model = build("llama")
    layers = UnlearningLayers(model, SMALL_LAYERS)
    with pytest.raises(ValueError, match="has unlearning layers already; remove them first"):
        UnlearningLayers(model, SMALL_LAYERS)
    layers.remove()
    UnlearningLayers(model, SMALL_LAYERS).remove()
    layers.attach()
    with pytest.raises(TypeError, match="model is a str"):
        UnlearningLayers("facebook/opt-1.3b")
    with pytest.raises(TypeError, match="merged first"):
        UnlearningLayers(get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))
    with pytest.raises(TypeError, match="config is a dict"):
        UnlearningLayers(build("llama"), {"reduction": 4})
    with pytest.raises(ValueError, match="reduction=64 exceeds the base's width, 32"):
        UnlearningLayers(build("llama"), UnlearningLayersConfig(reduction=64))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for kind in (None, "gradient", "activation"):  # the second is the name from transformers 5.23 on
        layers = stirred(build("llama", torch.float64)).train()
        if kind:
            enable = getattr(layers, f"{kind}_checkpointing_enable")
            enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}, every_n_layers=1)
        assert is_checkpointing(layers.get_base_model()) is (kind is not None)
        layers(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in layers.layers.parameters()])
        getattr(layers, f"{kind or 'gradient'}_checkpointing_disable")()
        assert not is_checkpointing(layers.get_base_model())
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_a_base_that_was_compiled_before_gets_its_layers_and_loses_them_again():
    model = build("llama").requires_grad_(False)
    expected = model(IDS).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, expected)
    layers = stirred(model)
    with_layers = layers(IDS).logits
    assert (with_layers - expected).abs().max() > 1e-3
    torch.testing.assert_close(compiled(IDS).logits, with_layers)
    with layers.disable_adapter():
        torch.testing.assert_close(compiled(IDS).logits, expected)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(compiled(IDS).logits))
        thread.start()
        thread.join()
        torch.testing.assert_close(seen[0], with_layers)
    torch.testing.assert_close(compiled(IDS).logits, with_layers)
    layers.remove()
    torch.testing.assert_close(compiled(IDS).logits, expected)


def test_layers_that_were_taken_off_do_not_pass_for_the_base(tmp_path):
    layers = stirred(build("llama"))
    layers.remove()
    assert not layers.attached
    with pytest.raises(ValueError, match="the layers are not attached"):
        layers(IDS)
    with pytest.raises(ValueError, match="the layers are not attached"):
        layers.generate(IDS)
    layers.save_pretrained(tmp_path)  # their weights are there all the same


def test_a_base_in_parts_elsewhere_is_refused_and_left_alone():
    model = build("llama").train()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp is offloaded"):
        UnlearningLayers(model, SMALL_LAYERS)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_of_another_width_and_without_weights_are_named():
    layers = UnlearningLayers(build("llama"), UnlearningLayersConfig(reduction=4, target_modules=("gate_proj",)))
    with pytest.raises(TypeError, match=r"mlp\.gate_proj returns .*\(2, 6, 64\), not hidden states of the width"):
        layers(IDS)
    UnlearningLayers(build("llama"), UnlearningLayersConfig(reduction=4, target_modules=("act_fn",)))


def test_the_blocks_of_an_image_tower_are_left_alone():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 300000, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    names = feed_forward_blocks(model)
    assert len(names) == 2
    assert all("language_model" in name for name in names)


def test_a_prompts_cached_states_notice_layers_that_come_later():
    from peft import PromptTuningConfig

    from spul import SoftPromptUnlearner

    model = build("llama", torch.float64)
    torch.manual_seed(0)
    prompted = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        prompted(input_ids=IDS, attention_mask=MASK)
        layers = stirred(model)
        embeds = torch.cat([prompted.get_prompt(batch_size=2), model.get_input_embeddings()(IDS)], dim=1)
        mask = torch.cat([MASK.new_ones(2, 3), MASK], dim=1)
        expected = model(inputs_embeds=embeds, attention_mask=mask).logits
        got = prompted(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(got[:, 3:][MASK.bool()], expected[:, 3:][MASK.bool()])
    layers.remove()


def test_a_config_of_a_later_version_loads(tmp_path):
    stirred(build("llama")).save_pretrained(tmp_path)
    path = tmp_path / "unlearning_layers.json"
    config = json.loads(path.read_text())
    del config["num_requests"]
    path.write_text(json.dumps({**config, "gates": True}))
    assert UnlearningLayers.from_pretrained(build("llama"), tmp_path).num_requests == 1


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_fixed_down_projection_never_learns_and_is_read_again_as_it_was(tmp_path, is_trainable):
    config = UnlearningLayersConfig(reduction=0.5, train_down=False)
    layers = UnlearningLayers(build("llama"), config)
    assert layers.layers[0].down.weight.shape == (64, 32)
    learning = {name for name, parameter in layers.named_parameters() if parameter.requires_grad}
    assert learning == {f"layers.{i}.up.{kind}" for i in range(2) for kind in ("weight", "bias")}
    layers.save_pretrained(tmp_path)
    loaded = UnlearningLayers.from_pretrained(build("llama"), tmp_path, is_trainable=is_trainable)
    assert loaded.layers_config == config
    assert loaded.layers[0].up.weight.requires_grad == is_trainable
    assert not loaded.layers[0].down.weight.requires_grad
    torch.testing.assert_close(loaded.layers[1].down.weight, layers.layers[1].down.weight, rtol=0, atol=0)
