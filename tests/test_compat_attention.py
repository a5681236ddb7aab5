"""Attention of a forward, observed: queries and keys are those of the layers, and the base is as before."""

import threading

import pytest
import torch
from helpers import build
from transformers.models.llama.modeling_llama import LlamaAttention

from spul.models.compat_attention import observed_attention

FAMILIES = ("llama", "opt", "gpt2", "qwen3", "gemma3", "gpt_neox", "mistral")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_observed_queries_and_keys_make_the_attention_of_the_layers(family, implementation):
    base = build(family, torch.float64).eval()
    ids, seen = torch.randint(3, 100, (2, 6)), {}
    base.set_attn_implementation("eager")
    attentions = base(ids, output_attentions=True).attentions
    base.set_attn_implementation(implementation)
    expected = base(ids).logits
    with observed_attention(base, lambda one: seen.update({one.layer: one})):
        assert torch.equal(base(ids).logits, expected)
    assert sorted(seen) == list(range(len(attentions)))
    for layer, attention in enumerate(attentions):
        group = seen[layer].queries.shape[1] // seen[layer].keys.shape[1]
        scores = seen[layer].queries @ seen[layer].keys.repeat_interleave(group, dim=1).transpose(-1, -2)
        later = torch.ones(6, 6).triu(1).bool()
        torch.testing.assert_close(scores.masked_fill(later, -torch.inf).softmax(-1), attention, rtol=1e-5, atol=1e-6)


def test_flash_attention_is_observed_as_eager_and_named_again_afterwards():
    base, seen = build("llama").eval(), []
    base.config._attn_implementation = "flash_attention_2"  # not installed here: it would raise in a forward
    with observed_attention(base, seen.append):
        base(torch.tensor([[3, 4]]))
    assert [one.layer for one in seen] == [0, 1]
    assert base.config._attn_implementation == "flash_attention_2"


def test_an_observer_inside_another_hides_it_for_a_while():
    base, outer, inner = build("llama").eval(), [], []
    ids = torch.tensor([[3, 4]])
    before = base.config._attn_implementation
    with observed_attention(base, outer.append):
        with observed_attention(base, inner.append):
            base(ids)
        base(ids)
    assert (len(inner), len(outer)) == (2, 2)
    assert base.config._attn_implementation == before


def test_the_attention_is_as_before_also_after_an_error():
    base = build("llama")
    base.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="stop"), observed_attention(base, lambda one: None):
        raise RuntimeError("stop")
    assert base.config._attn_implementation == "eager"


def test_another_thread_is_not_observed():
    base, seen = build("llama").eval(), []
    with observed_attention(base, seen.append):
        other = threading.Thread(target=lambda: base(torch.tensor([[3, 4]])))
        other.start()
        other.join()
    assert seen == []


class OwnAttention(LlamaAttention):
    """A user's class, in a module without an eager attention."""


def test_attention_of_a_users_class_is_that_of_its_family():
    base, seen = build("llama").eval(), []
    base.set_attn_implementation("eager")
    expected = base(torch.tensor([[3, 4]])).logits
    for layer in base.model.layers:
        layer.self_attn.__class__ = OwnAttention
    with observed_attention(base, seen.append):
        assert torch.equal(base(torch.tensor([[3, 4]])).logits, expected)
    assert len(seen) == 2
