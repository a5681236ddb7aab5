"""Gradient checkpointing behind a shared prompt: equal to the plain twin, shared, recomputed, or refused loudly."""

import threading
import weakref

import pytest
import torch
import transformers
from cache_droppers import begins_behind_a_cache, under_prompt
from helpers import CONFIGS, FAMILIES, SHAPE, build, build_unlearner, make_batch, prompt_gradients
from passes import Passes, assert_as_plain, checkpointed
from plain import losses as plain_losses
from plain import row_logits
from torch._dynamo.backends.common import aot_autograd
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from spul import SoftPromptUnlearner
from spul.models.causal_lm import decoder_layers
from spul.models.compat_cache import CACHE_NAME, cache_argument, empty_cache
from spul.models.compat_checkpointing import is_checkpointing, kept_cache, switch_checkpointing, without_checkpointing
from spul.models.compat_devices import TensorMemory
from spul.prompts.shared_prefix import prompt_states

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


@REENTRANT
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_losses_and_gradients_equal_the_plain_twin_behind_a_prompt_that_is_shared(family, prompt_type, reentrant):
    unlearner, batch = checkpointed(build_unlearner(family, prompt_type), reentrant), make_batch()
    passes = Passes(unlearner)
    unlearner(**batch)  # earns the shared prefix
    passes.shapes.clear()
    unlearner(**batch).loss.backward()
    prompt, rows, reference = (1, 5), (5, 12), (3, 12)
    own = [] if prompt_type == "prefix_tuning" else [prompt]
    assert passes.shapes == [*own, rows, reference, rows, *own]  # then, from the end, what is recomputed
    assert_as_plain(unlearner, batch)


@REENTRANT
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_float32_equals_the_plain_twin(family, prompt_type, reentrant):
    unlearner = checkpointed(build_unlearner(family, prompt_type, torch.float32), reentrant)
    assert_as_plain(unlearner, make_batch(), rtol=1e-3, atol=1e-4)


@REENTRANT
@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_prompt_longer_than_the_sliding_window_equals_the_plain_twin(family, window, prompt_type, reentrant):
    unlearner = build_unlearner(family, prompt_type, p=8, sliding_window=window)
    assert_as_plain(checkpointed(unlearner, reentrant), make_batch())


def test_layers_that_are_not_checkpointed_keep_their_cache_beside_those_that_are(prompt_type):
    unlearner = checkpointed(build_unlearner("llama", prompt_type))
    decoder_layers(unlearner)[1].gradient_checkpointing = False  # as `every_n_layers=2` of newer versions does
    passes = [Passes(unlearner, layer) for layer in (0, 1)]
    assert_as_plain(unlearner, make_batch())
    assert len(passes[0].shapes) > len(passes[1].shapes)


def test_a_base_that_is_checkpointing_can_be_wrapped_and_trained(prompt_type):
    base = build("llama", torch.float64).train()
    switch_checkpointing(base, "enable")
    torch.manual_seed(1)
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type](5)).double()
    unlearner.add_adapter("other", CONFIGS[prompt_type](3))
    assert is_checkpointing(base)
    assert_as_plain(unlearner, make_batch())


def test_rows_with_prompts_of_their_own_have_the_gradients_that_they_have_without_checkpointing(prompt_type):
    unlearner, batch = build_unlearner("llama", prompt_type), make_batch()
    unlearner.add_adapter("other", CONFIGS[prompt_type](5 if prompt_type == "prefix_tuning" else 3))
    unlearner.double().set_adapter("default")
    names = ["other", "default", "__base__", "default", "other"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    plain = unlearner(**inputs, adapter_names=names)
    expected = prompt_gradients(unlearner, plain.loss)
    out = checkpointed(unlearner)(**inputs, adapter_names=names)
    found = prompt_gradients(unlearner, out.loss)
    torch.testing.assert_close(out.logits, plain.logits)
    assert found.keys() == expected.keys() != set()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("gradients", [False, True])
def test_an_ordinary_forward_is_that_without_checkpointing(prompt_type, gradients):
    unlearner, batch = build_unlearner("llama", prompt_type), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.set_grad_enabled(gradients):
        expected, out = unlearner(**inputs), checkpointed(unlearner)(**inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits, expected.logits)


def test_no_message_says_that_a_cache_is_dropped(prompt_type, caplog):
    transformers.utils.logging.warning_once.cache_clear()
    transformers.utils.logging.enable_propagation()
    try:
        checkpointed(build_unlearner("llama", prompt_type))(**make_batch()).loss.backward()
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [message for message in caplog.messages if "ache" in message]


# ---- what cannot be done right ----


class DropsInTraining(LlamaForCausalLM):
    """Begins anew behind a cache while it trains."""

    def forward(self, *args, **kwargs):
        if self.training and begins_behind_a_cache(args, kwargs):
            kwargs[CACHE_NAME] = DynamicCache()
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :]
        return super().forward(*args, **kwargs)


class ForgetsInBackward(LlamaForCausalLM):
    """Has the right logits, and no gradient of the cached keys and values."""

    def forward(self, *args, **kwargs):
        cache = kwargs.get(CACHE_NAME)
        if self.model.layers[0].gradient_checkpointing and self.training and cache is not None:
            for layer in cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("base_class", [DropsInTraining, ForgetsInBackward])
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_a_base_that_loses_the_prompt_under_checkpointing_is_run_by_concatenation(base_class, kind, caplog):
    unlearner = checkpointed(under_prompt(base_class, kind))
    assert_as_plain(unlearner, make_batch())
    unlearner(**make_batch())
    assert caplog.text.count("loses or changes a shared prompt under gradient checkpointing") == 1
    assert caplog.text.count("concatenated to every row") == 1


@pytest.mark.parametrize("base_class", [DropsInTraining, ForgetsInBackward])
def test_a_base_that_loses_a_prefix_under_checkpointing_is_refused(base_class):
    unlearner, batch = checkpointed(under_prompt(base_class, "prefix_tuning")), make_batch()
    for call in (
        lambda: unlearner(**batch),
        lambda: unlearner(input_ids=batch["input_ids"]),
        lambda: unlearner.embedding_logits(
            unlearner.word_embeddings(batch["input_ids"]),
            batch["attention_mask"],
            torch.zeros(5, 1, dtype=torch.long),
        ),
    ):
        with pytest.raises(ValueError, match=r"gradient checkpointing of .* drops or changes the keys and values"):
            call()


def test_a_compiled_base_is_run_by_concatenation_under_checkpointing(caplog):
    torch.compiler.reset()
    unlearner = build_unlearner("llama")
    unlearner.get_base_model().compile(backend=aot_autograd(fw_compiler=lambda graph, inputs: graph.forward))
    out = checkpointed(unlearner)(**make_batch())
    assert "or is compiled" in caplog.text
    torch.testing.assert_close(out.loss, plain_losses(build_unlearner("llama"), make_batch())[0])
    torch.compiler.reset()


# ---- the layers' functions ----


def test_a_base_is_as_before_after_a_forward_and_after_an_error():
    base = build("llama").train()
    switch_checkpointing(base, "enable")
    before = [dict(vars(layer)) for layer in decoder_layers(base)]
    cache = empty_cache(base)
    with kept_cache(base, cache):
        base(torch.ones(1, 3, dtype=torch.long), **{cache_argument(base): cache})
        assert cache.get_seq_length() == 3
        assert [dict(vars(layer)) for layer in decoder_layers(base)] != before
    with pytest.raises(RuntimeError, match="of the caller"), kept_cache(base, cache):
        raise RuntimeError("of the caller")
    assert [dict(vars(layer)) for layer in decoder_layers(base)] == before
    with without_checkpointing(base):
        assert not is_checkpointing(base)
    assert is_checkpointing(base)
    assert [dict(vars(layer)) for layer in decoder_layers(base)] == before


def test_a_forward_in_another_thread_does_not_get_the_cache():
    unlearner = checkpointed(build_unlearner("llama"))
    base, ids = unlearner.get_base_model(), make_batch()["input_ids"][:1]
    cache = empty_cache(base)
    found = []
    with kept_cache(base, cache):
        base(ids, **{cache_argument(base): cache})
        other = threading.Thread(target=lambda: found.append(base(ids, use_cache=False).logits))
        other.start()
        other.join()
    assert cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(found[0][0], row_logits(unlearner, ids[0], prompted=False))


@REENTRANT
@pytest.mark.parametrize("mixed", [False, True])
def test_a_further_layer_keeps_its_input_and_the_prompt_but_no_gradients_of_rows(reentrant, mixed):
    """Of many layers, those of the keys and values of all rows would be most of the memory."""
    rows, tokens, virtual, width, of_keys = 20, 12, 40, 32, 16

    def peak(num_layers):
        shape = {**SHAPE, "num_hidden_layers": num_layers, "intermediate_size": 48, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(**shape))
        unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](virtual))
        unlearner.add_adapter("other", CONFIGS["prompt_tuning"](3))
        checkpointed(unlearner, reentrant)
        ids = torch.full((rows, tokens), 7)
        inputs = {"attention_mask": torch.ones_like(ids), "positions": torch.full((rows, 1), tokens - 1)}
        names = ["default", "other"] * (rows // 2) if mixed else None

        def step():
            unlearner.response_logits(ids, **inputs, adapter_names=names).sum().backward()

        step()  # the probe is not part of a step
        with TensorMemory(base.config.vocab_size, (*base.parameters(), *base.buffers())) as memory:
            step()
        return memory.peak

    own = rows * tokens * width + virtual * (width + 4 * of_keys)
    if mixed:  # a copy for each row is made before all layers
        own += rows * virtual * 2 * of_keys
    assert 0 < (peak(8) - peak(4)) / 4 < 1.2 * own * 4


@REENTRANT
def test_what_a_forward_holds_is_freed_with_it(reentrant):
    unlearner = checkpointed(build_unlearner("gemma3"), reentrant)
    states = prompt_states(unlearner)
    assert states.layers[0].keys.grad_fn is not None
    held = [weakref.ref(layer.keys) for layer in states.layers]
    del states
    assert [ref() for ref in held] == [None] * len(held)
