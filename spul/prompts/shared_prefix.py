"""The shared prefix: the prompt runs once, and every row of the batch attends to its keys and values.

A prompt stands in front of a causal model's input, so its keys and values do not depend on the input. Prompt tuning
and P-tuning therefore pass through the model once per step with batch size 1, gradient included; prefix tuning *is*
keys and values and needs no pass. Without gradient, the states are cached for the next call. For models without a
plain key/value cache, the prompt is concatenated to every row instead.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from torch import Tensor, nn

from ..models.causal_lm import cache_switch, evaluation_mode, logits_at, needs_gradient, selects_positions, warn_once
from ..models.compat import (
    LayerStates,
    cache_argument,
    empty_cache,
    expanded_cache,
    forward_hooks,
    is_checkpointing,
    layer_states,
    returned_cache,
    weight_versions,
)

# Bases found to have no plain cache, so that they are not tried again in every step.
_without_cache: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class PromptStates:
    """Keys and values of a prompt, and the prompt and the base they were computed from."""

    layers: list[LayerStates]
    logits: Tensor | None = None  # (1, p, V) at the virtual tokens, if they were requested
    prompt: Tensor | None = None  # (1, p, d); None for prefix tuning
    base: tuple = ()  # see `_base_version`

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens."""
        return self.layers[0].seen

    def prefix_inputs(self, base_model: Any, attention_mask: Tensor, num_sequences: int | None = None) -> dict:
        """Arguments that put the prompt in front of a batch in a forward of the base: mask and filled cache.

        Args:
            base_model: the base.
            attention_mask: (B, n), of the rows without virtual tokens.
            num_sequences: batch size of the cache; B unless given.
        """
        rows = len(attention_mask)
        return {
            "attention_mask": torch.cat(
                [attention_mask.new_ones(rows, self.num_virtual_tokens), attention_mask], dim=1
            ),
            cache_argument(base_model): expanded_cache(self.layers, base_model, num_sequences or rows),
        }

    def matches(self, prompt: Tensor, base: tuple) -> bool:
        """Whether prompt and base are the same, the prompt bit for bit."""
        own = self.prompt
        return (
            own is not None
            and (own.dtype, own.device, own.shape, self.base) == (prompt.dtype, prompt.device, prompt.shape, base)
            and torch.equal(own, prompt)
        )


def prompt_states(model: Any, with_logits: bool = False) -> PromptStates | None:
    """Return the keys and values of the active prompt, batch size 1; None if the base has no plain cache.

    They are computed anew if a gradient is required; else cached until prompt or base change.

    Args:
        model: a prompt-learning PEFT model.
        with_logits: whether to return the logits at the virtual tokens too.
    """
    base: Any = model.get_base_model()
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        layers = layer_states(model.get_prompt(batch_size=1))
        return None if layers is None else PromptStates(layers)
    if base in _without_cache:
        return None
    prompt = model.get_prompt(batch_size=1).to(model.word_embeddings.weight.dtype)
    if needs_gradient(model):
        return _compute_states(base, prompt, (), with_logits)
    by_adapter: dict[str, PromptStates] = model.__dict__.setdefault("_cached_prompts", {})
    version = _base_version(base, prompt.device.type)
    cached = by_adapter.get(model.active_adapter)
    if cached is None or not cached.matches(prompt, version) or (with_logits and cached.logits is None):
        cached = _compute_states(base, prompt, version, with_logits)
        if cached is not None:
            by_adapter[model.active_adapter] = cached
    return cached


def outgrows_cache(model: Any, num_tokens: int) -> bool:
    """Whether virtual tokens and rows of `num_tokens` together may outgrow the keys and values of the prompt's pass.

    Beyond the switch of longrope they differ from those of a whole sequence; see `cache_switch`.
    """
    base: Any = model.get_base_model()
    switch, _ = cache_switch(base)
    if switch is None or model.active_peft_config.num_virtual_tokens + num_tokens <= switch:
        return False
    warn_once(
        f"{type(base).__name__} changes beyond {switch} positions, where a shared prompt is not the same: the prompt "
        "is concatenated to every row, which is slower."
    )
    return True


@torch.no_grad()
def check_prefix(model: Any) -> None:
    """Raise unless the base takes the active prefix as the keys and values of its layers, by one token's forward.

    Raises:
        ValueError: if it does not: it caches another number of heads or another width (multi-query and multi-head
            latent attention), or layers without keys and values (Mamba, linear attention).
    """
    base: Any = model.get_base_model()
    token = torch.zeros((1, 1), dtype=torch.long, device=model.word_embeddings.weight.device)
    try:
        with evaluation_mode(base):
            states = layer_states(model.get_prompt(batch_size=1))
            if states is not None:
                inputs = PromptStates(states).prefix_inputs(base, torch.ones_like(token))
                base(input_ids=token, use_cache=True, **inputs)
                return
            cause = None
    except (RuntimeError, AttributeError, ValueError, TypeError, IndexError, KeyError) as error:
        cause = error
    heads, width = model.active_peft_config.num_attention_heads, model.active_peft_config.token_dim
    raise ValueError(
        f"prefix tuning cannot serve {type(base).__name__}: its layers do not take {heads} heads of {width // heads} "
        f"keys and values each, as the prefix has{'' if cause is None else f' ({cause})'}. Multi-query and latent "
        "attention, and layers without a plain key/value cache, differ so. Use PromptTuningConfig or "
        "PromptEncoderConfig, whose virtual tokens are input embeddings."
    ) from cause


def check_prefix_is_kept(base: nn.Module) -> None:
    """Raise where gradient checkpointing drops a cache, and a prefix with it.

    Raises:
        ValueError: if it is on.
    """
    if is_checkpointing(base):
        raise ValueError(
            "gradient checkpointing drops the keys and values that prefix tuning trains. Turn it off "
            "(TrainingArguments(gradient_checkpointing=False)), or use PromptTuningConfig or PromptEncoderConfig."
        )


def _compute_states(base: Any, prompt: Tensor, version: tuple, with_logits: bool) -> PromptStates | None:
    last = {"logits_to_keep": 1} if selects_positions(base) and not with_logits else {}
    out = base(inputs_embeds=prompt, **{cache_argument(base): empty_cache(base)}, use_cache=True, **last)
    layers = layer_states(returned_cache(out))
    if layers is None:
        _without_cache.add(base)
        return None
    return PromptStates(layers, out.logits if with_logits else None, prompt, version)


def _base_version(base: nn.Module, device_type: str) -> tuple:
    """Autocast, weights and forward hooks: changes whenever the base may compute other states."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return autocast, weight_versions(base), tuple(key for key, _ in forward_hooks(base))


def response_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits of the prompted model at `positions` of a right-padded batch.

    Args:
        model: a prompt-learning PEFT model, its prompt enabled.
        input_ids: (B, n), right-padded, without virtual tokens.
        attention_mask: (B, n).
        positions: (B, K), counted without virtual tokens.

    Returns:
        (B, K, V).

    Raises:
        ValueError: for prefix tuning under gradient checkpointing, which drops the prefix.
    """
    base: Any = model.get_base_model()
    states = None
    if is_checkpointing(base):
        if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            check_prefix_is_kept(base)
        warn_once("Gradient checkpointing keeps no cache: the prompt is concatenated to every row, which is slower.")
    elif (
        model.active_peft_config.peft_type == PeftType.PREFIX_TUNING  # no pass, and no other way
        or not outgrows_cache(model, input_ids.shape[1])
    ):
        states = prompt_states(model)
        if states is None:
            if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
                raise ValueError(f"prefix tuning needs a plain key/value cache, which {type(base).__name__} has not.")
            warn_once(f"{type(base).__name__} has no plain key/value cache: the prompt is concatenated to every row.")
    if states is None:
        return concatenated_logits(model, model.word_embeddings(input_ids), attention_mask, positions)
    return logits_at(
        base, positions, input_ids=input_ids, **states.prefix_inputs(base, attention_mask), use_cache=True
    )


def concatenated_logits(model: Any, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """`response_logits` from the rows' embeddings, with the prompt's in front of every row, as in PEFT."""
    prompt = model.get_prompt(batch_size=len(embeds)).to(embeds.dtype)
    return logits_at(
        model.get_base_model(),
        positions + prompt.shape[1],
        inputs_embeds=torch.cat([prompt, embeds], dim=1),
        attention_mask=torch.cat([attention_mask.new_ones(prompt.shape[:2]), attention_mask], dim=1),
    )
