"""Bases that lose a given cache, or refuse it, and prompts on such bases."""

import torch
from helpers import CONFIGS, SHAPE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from spul import SoftPromptUnlearner
from spul.models.compat_cache import CACHE_NAME


def begins_behind_a_cache(args, kwargs):
    """Whether a call has several tokens, and a cache that holds something: the first call behind a shared prompt."""
    tokens = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
    cache = kwargs.get(CACHE_NAME)
    return tokens.shape[1] > 1 and cache is not None and cache.get_seq_length() > 0


class DropsTheCache(LlamaForCausalLM):
    """Begins anew behind a cache, as longrope does beyond its switch."""

    def forward(self, *args, **kwargs):
        if begins_behind_a_cache(args, kwargs):
            kwargs[CACHE_NAME] = DynamicCache()
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :]
        return super().forward(*args, **kwargs)


class ForgetsWhereItIs(LlamaForCausalLM):
    """Counts positions from zero behind a cache."""

    def forward(self, *args, **kwargs):
        if begins_behind_a_cache(args, kwargs):
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return super().forward(*args, **kwargs)


class RefusesACache(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        if begins_behind_a_cache(args, kwargs):
            raise NotImplementedError("tokens are taken one by one behind a cache")
        return super().forward(*args, **kwargs)


def under_prompt(base_class, prompt_type="prompt_tuning"):
    torch.manual_seed(0)
    base = base_class(LlamaConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SoftPromptUnlearner(base.double().eval(), CONFIGS[prompt_type](5)).double().eval()
