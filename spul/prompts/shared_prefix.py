"""The prompted forward: the prompt runs once, and every row of the batch attends to its keys and values.

A prompt stands in front of a causal model's input, so what it computes does not depend on the input. Prompt tuning and
P-tuning therefore pass through the model once per step with batch size 1, gradient included; prefix tuning *is* keys
and values and needs no pass. Without gradient, what the pass gave is kept for the next call. Where a cache cannot be
had, the prompt is concatenated to every row instead.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..models.causal_lm import is_checkpointing, logits_at, needs_gradient, say_once, selects_positions

logger = logging.getLogger(__name__)


class LayerStates(NamedTuple):
    """What one attention layer keeps of the prompt."""

    keys: Tensor  # (1, heads, kept, head width); a sliding-window layer keeps its last window - 1 positions
    values: Tensor
    seen: int  # positions that passed, kept or not


# Bases that were found to have no plain cache, so that they are not tried again in every step.
_without_cache: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class PromptStates:
    """What the base computed of a prompt, and what it was computed from."""

    layers: list[LayerStates]
    logits: Tensor | None = None  # (1, p, V) at the virtual tokens, if they were asked for
    prompt: Tensor | None = None  # (1, p, d); prefix tuning has none
    base: tuple = ()  # what `_state_of` said of the base

    def is_of(self, prompt: Tensor, base: tuple) -> bool:
        """Whether the prompt is the same, bit for bit, and the base too."""
        mine = self.prompt
        return (
            mine is not None
            and (mine.dtype, mine.device, mine.shape, self.base) == (prompt.dtype, prompt.device, prompt.shape, base)
            and torch.equal(mine, prompt)
        )


def prompt_states(model: Any, with_logits: bool = False) -> PromptStates | None:
    """The keys and values of the active prompt, batch size 1; None if they cannot be had.

    Where a gradient is asked for they are computed; else they are kept from call to call until prompt or base change.

    Args:
        model: a prompt-learning PEFT model.
        with_logits: whether the logits at the virtual tokens are wanted too.
    """
    base: Any = model.get_base_model()
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        layers = _layer_states(model.get_prompt(batch_size=1))
        return None if layers is None else PromptStates(layers)
    if base in _without_cache:
        return None
    prompt = model.get_prompt(batch_size=1).to(model.word_embeddings.weight.dtype)
    if needs_gradient(model):
        return _pass(base, prompt, (), with_logits)
    by_adapter: dict[str, PromptStates] = model.__dict__.setdefault("_kept_prompts", {})
    state = _state_of(base, prompt.device.type)
    kept = by_adapter.get(model.active_adapter)
    if kept is None or not kept.is_of(prompt, state) or (with_logits and kept.logits is None):
        kept = _pass(base, prompt, state, with_logits)
        if kept is not None:
            by_adapter[model.active_adapter] = kept
    return kept


def _pass(base: Any, prompt: Tensor, state: tuple, with_logits: bool) -> PromptStates | None:
    fresh = DynamicCache(config=base.config.get_text_config())
    last = {"logits_to_keep": 1} if selects_positions(base) and not with_logits else {}
    out = base(inputs_embeds=prompt, past_key_values=fresh, use_cache=True, **last)
    layers = _layer_states(getattr(out, "past_key_values", None))
    if layers is None:
        _without_cache.add(base)
        return None
    return PromptStates(layers, out.logits if with_logits else None, prompt, state)


def _layer_states(cache: Any) -> list[LayerStates] | None:
    layers = getattr(cache, "layers", None)
    if not layers or not all(
        type(x) in (DynamicLayer, DynamicSlidingWindowLayer) and x.is_initialized for x in layers
    ):
        return None
    return [LayerStates(layer.keys, layer.values, layer.get_seq_length()) for layer in layers]


def _state_of(base: nn.Module, device_type: str) -> tuple:
    """Changes with autocast and forward hooks, and when a weight is replaced, moved, or written to but by `.data`."""
    hooks = tuple(key for module in base.modules() for key in module._forward_hooks)
    weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in base.parameters())
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return autocast, weights, hooks


def expand_states(layers: list[LayerStates], base_model: Any, batch_size: int) -> DynamicCache:
    """A fresh cache in which every one of `batch_size` rows has seen the prompt. It grows with use: never reuse it."""
    cache = DynamicCache(config=base_model.config.get_text_config())
    fresh: list[Any] = cache.layers
    for layer, kept in zip(fresh, layers, strict=True):
        keys, values = (t.expand(batch_size, -1, -1, -1) for t in (kept.keys, kept.values))
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            # A prompt longer than the window leaves only its end, but its whole length counts for positions.
            keys, values = (t[:, :, -layer.sliding_window + 1 :] for t in (keys, values))
            layer.cumulative_length = kept.seen
        # Not by `update`, which would copy the prompt for every row before the rows' own tokens are added.
        layer.keys, layer.values = keys, values
    return cache


def prompted_logits(model: PeftModel, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits of the prompted model at `positions` of a right-padded batch.

    Args:
        model: a prompt-learning PEFT model.
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
            raise ValueError(
                "gradient checkpointing drops the keys and values that prefix tuning learns. Turn it off "
                "(TrainingArguments(gradient_checkpointing=False)), or use PromptTuningConfig or PromptEncoderConfig."
            )
        say_once("Gradient checkpointing keeps no cache: the prompt is concatenated to every row, which is slower.")
    else:
        states = prompt_states(model)
        if states is None:
            if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
                raise ValueError(f"prefix tuning needs a plain key/value cache, which {type(base).__name__} has not.")
            say_once(f"{type(base).__name__} has no plain key/value cache: the prompt is concatenated to every row.")
    if states is None:
        return _concatenated_logits(model, input_ids, attention_mask, positions)
    return logits_after(states, base, positions, attention_mask, input_ids=input_ids)


def logits_after(
    states: PromptStates, base: Any, positions: Tensor, attention_mask: Tensor, **inputs: Tensor
) -> Tensor:
    """Logits (B, K, V) at `positions` of rows that have seen the prompt, given as `input_ids` or `inputs_embeds`."""
    num_rows = len(attention_mask)
    seen = attention_mask.new_ones(num_rows, states.layers[0].seen)
    return logits_at(
        base,
        positions,
        **inputs,
        attention_mask=torch.cat([seen, attention_mask], dim=1),
        past_key_values=expand_states(states.layers, base, num_rows),
        use_cache=True,
    )


def _concatenated_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """The same with the prompt's embeddings in front of every row, as PEFT does it."""
    embeds = model.word_embeddings(input_ids)
    prompt = model.get_prompt(batch_size=len(input_ids)).to(embeds.dtype)
    return logits_at(
        model.get_base_model(),
        positions + prompt.shape[1],
        inputs_embeds=torch.cat([prompt, embeds], dim=1),
        attention_mask=torch.cat([attention_mask.new_ones(prompt.shape[:2]), attention_mask], dim=1),
    )
