"""A prefix reaches the layers as PEFT would hand it to them, exactly, by few operators."""

import ast
import inspect
import textwrap
from collections import Counter

import pytest
import torch
from helpers import SHAPE, assert_same, build, make_batch, prompt_gradients
from peft import CartridgeConfig, PeftModel, PeftModelForCausalLM, PrefixTuningConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from spul import SoftPromptUnlearner, UnlearningLoss
from spul.models import compat_cache
from spul.models.compat_cache import expanded_cache, layer_states, padded_prompts, prefix_states
from spul.models.compat_checkpointing import switch_checkpointing
from spul.prompts import shared_prefix

PREFIXES = {
    "prefix_tuning": lambda p=5: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
    "projection": lambda p=5: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda p=5: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=p),
    "frozen": lambda p=5: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, num_frozen_tokens=2),
}
HELPED = ("llama", "opt", "gpt2", "qwen3", "gemma3", "gpt_neox", "mistral")


def gemma4(num_sharing=0):
    """Layers of two shapes, the last of which may share the keys of those before them."""
    config = Gemma4TextConfig(
        **{**SHAPE, "num_hidden_layers": 4},
        intermediate_size=48,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        sliding_window=4,
        num_kv_shared_layers=num_sharing,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=SHAPE["vocab_size"],
        hidden_size_per_layer_input=8,
    )
    return Gemma4ForCausalLM(config)


def gemma2():
    return Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=4)
    )


OTHERS = {
    "gemma2": gemma2,
    "gemma4": gemma4,
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=120, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SHAPE, new_decoder_architecture=True, num_kv_heads=4)),
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=96, multi_query=False)
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4)
    ),
}


def base_of(family):
    return build(family) if family in HELPED else OTHERS[family]()


def by_peft(model):
    """The plain twin: the cache that PEFT makes."""
    return layer_states(model.get_prompt(batch_size=1))


def prefixed(family, kind, p=5):
    torch.manual_seed(1)
    return PeftModelForCausalLM(base_of(family).double(), PREFIXES[kind](p)).double()


def assert_same_states(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.seen == other.seen
        for tensor, twin in ((one.keys, other.keys), (one.values, other.values)):
            torch.testing.assert_close(tensor, twin, rtol=0, atol=0)


@pytest.mark.parametrize("family", [*HELPED, *OTHERS])
@pytest.mark.parametrize("kind", PREFIXES)
def test_keys_values_and_gradients_are_those_of_pefts_cache(family, kind):
    model = prefixed(family, kind)
    found, gradients = [], []
    for way in (prefix_states, by_peft):
        states, generator = way(model), torch.Generator().manual_seed(2)
        assert states is not None
        tensors = [tensor for one in states for tensor in one[:2]]
        weighed = [(t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors]
        gradients.append(prompt_gradients(model, torch.stack(weighed).sum()))
        found.append(states)
    assert_same_states(*found)
    assert gradients[0]
    assert_same(*gradients, rtol=0, atol=0)


def test_layers_that_share_keys_have_the_states_that_peft_leaves_them():
    torch.manual_seed(1)
    model = PeftModelForCausalLM(gemma4(num_sharing=2), PREFIXES["prefix_tuning"]())
    with pytest.warns(UserWarning, match="skipped"):
        found, expected = prefix_states(model), by_peft(model)
    model.get_base_model().hf_device_map = {"": "cpu"}
    with pytest.warns(UserWarning, match="skipped"):
        mapped = prefix_states(model)
    if expected is None:  # newer versions of transformers have empty layers for them
        assert found is None
        assert mapped is None
    else:
        assert_same_states(found, expected)
        assert_same_states(mapped, expected)


def test_type_and_mode_of_a_prefix_are_pefts_and_its_devices_those_of_the_layers():
    model = prefixed("llama", "prefix_tuning")
    model.get_base_model().bfloat16()
    assert prefix_states(model)[0].keys.dtype == torch.bfloat16
    assert_same_states(prefix_states(model), by_peft(model))
    model.active_peft_config.inference_mode = True
    assert_same_states(prefix_states(model), by_peft(model))
    base = model.get_base_model()
    base.model.layers[1].to("meta")
    base.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta", "lm_head": "meta"}
    assert [one.keys.device.type for one in prefix_states(model)] == ["cpu", "meta"]


def test_a_prompt_that_is_not_the_only_one_is_read_by_its_name():
    model = prefixed("llama", "prefix_tuning")
    model.add_adapter("other", PREFIXES["prefix_tuning"](3))
    for name in ("default", "other"):
        model.set_adapter(name)
        assert prefix_states(model)[0].seen == {"default": 5, "other": 3}[name]
        assert_same_states(prefix_states(model), by_peft(model))


def test_families_whose_prefixes_peft_fits_to_layers_are_all_known():
    tree = ast.parse(textwrap.dedent(inspect.getsource(PeftModel.get_prompt)))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In)]
    names = {test.left.value for test in tests if getattr(test.comparators[0], "id", None) == "model_type"}
    assert names == set(compat_cache._PREFIX_FITTED)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_step_is_exactly_that_behind_pefts_cache(family, kind, checkpoints, monkeypatch):
    torch.manual_seed(1)
    base = base_of(family).double()
    if checkpoints:
        switch_checkpointing(base, "enable")
    unlearner = SoftPromptUnlearner(base, PREFIXES[kind](), loss=UnlearningLoss(beta=1.0)).double().train()
    batch = make_batch()
    loss = unlearner(**batch).loss
    found = prompt_gradients(unlearner, loss)
    monkeypatch.setattr(shared_prefix, "prefix_states", by_peft)
    expected = unlearner(**batch).loss
    assert torch.equal(loss, expected)
    assert_same(found, prompt_gradients(unlearner, expected), rtol=0, atol=0)


# ---- the cache of a batch ----


def copied_cache(layers, base, num_rows, index=None):
    """The plain twin of `expanded_cache`: transformers caches the first prompt, and rows are copies."""
    config = base.config.get_text_config()
    cache = DynamicCache([(one.keys[:1], one.values[:1]) for one in layers], config=config)
    for layer, one in zip(cache.layers, layers, strict=True):
        own = index if index is not None else torch.zeros(num_rows, dtype=torch.long)
        first = one.keys.shape[2] - layer.keys.shape[2]
        layer.keys, layer.values = one.keys[:, :, first:][own], one.values[:, :, first:][own]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = one.seen
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "gemma2", "gemma4"])
@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_has_the_cache_that_transformers_fills(family, p, mixed):
    model, index = prefixed(family, "prefix_tuning", p), None
    layers = prefix_states(model)
    if mixed:
        layers, index = padded_prompts([layers, None], p), torch.tensor([1, 0, 0])
    base = model.get_base_model()
    found, expected = expanded_cache(layers, base, 3, index), copied_cache(layers, base, 3, index)
    assert found.get_seq_length() == expected.get_seq_length() == p
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        assert vars(one).pop("prompts").own[0].requires_grad
        for name, value in vars(other).items():
            assert torch.equal(value, vars(one)[name]) if torch.is_tensor(value) else value == vars(one)[name], name
        own = torch.ones(3, *one.keys.shape[1:2], 2, *one.keys.shape[3:], dtype=torch.float64)
        for tensor, twin in zip(one.update(own, own), other.update(own, own), strict=True):
            assert torch.equal(tensor, twin)


# ---- operators of a step ----


class Operators(TorchDispatchMode):
    """Counts the operators that are more than views, of which one is not marked as such."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(num_layers, kind):
    """Those of a step, forward and backward, behind a prefix; of the rows alone without one."""
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": num_layers}
    base = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48)).requires_grad_(False)
    batch = make_batch()
    inputs = {"attention_mask": batch["attention_mask"], "use_cache": False}
    if kind is None:
        embeds = base.get_input_embeddings()(batch["input_ids"]).requires_grad_()

        def step():
            base(inputs_embeds=embeds, **inputs).logits.sum().backward()
    else:
        unlearner = SoftPromptUnlearner(base, PREFIXES[kind](), loss=UnlearningLoss(beta=0.0)).train()

        def step():
            unlearner(**batch).loss.backward()

    step()
    with Operators() as counting:
        step()
    return counting.found


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_adds_to_a_layer_two_cats_two_sums_and_a_copy(kind):
    added = []
    for num_layers in (2, 6):
        counts = operators(num_layers, kind)
        counts.subtract(operators(num_layers, None))
        added.append(counts)
    grown = {name: (added[1][name] - added[0][name]) / 4 for name in added[1] if added[1][name] != added[0][name]}
    # Keys and values are put before the rows'; their gradients are summed over rows. The rest of the values' is a view
    # with gaps, which the linear map before it copies.
    assert grown == {"cat": 2, "sum": 2, "clone": 1}
