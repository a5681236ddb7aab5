"""The prompted forward: the prompt runs once, and every row of the batch attends to its keys and values.

A prompt stands in front of a causal model's input, so what it computes does not depend on the input. Prompt tuning and
P-tuning therefore pass through the model once per step with batch size 1, gradient included; prefix tuning *is* keys
and values and needs no pass. Without gradient, what the pass gave is kept for the next call. Where a cache cannot be
had, the prompt is concatenated to every row instead.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import transformers.modeling_utils
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .terms import IGNORE_INDEX

logger = logging.getLogger(__name__)


class LayerStates(NamedTuple):
    """What one attention layer keeps of the prompt."""

    keys: Tensor  # (1, heads, kept, head width); a sliding-window layer keeps its last window - 1 positions
    values: Tensor
    seen: int  # positions that passed, kept or not


def pack_right(attention_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Move the real tokens of every row to its start, in order, whatever side was padded.

    Args:
        attention_mask: (B, n), 1 for real tokens.
        tensors: (B, n) each, carried along.

    Returns:
        The packed mask and tensors.
    """
    order = attention_mask.ne(0).long().argsort(dim=1, descending=True, stable=True)
    return [tensor.gather(1, order) for tensor in (attention_mask, *tensors)]


def has_left_padding(attention_mask: Tensor) -> bool:
    """Whether some row has a real token right of a pad."""
    return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def response_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the response tokens are predicted: one position before each, as in every causal language model.

    A label in the first column has no token before it and is not used, as in transformers' own loss.

    Args:
        labels: (B, n), -100 where there is nothing to predict.

    Returns:
        `positions` (B, K) and `targets` (B, K): slot k of row b is the k-th response token of the row; K is the
        largest number of response tokens in a row, unused slots have the target -100 and some valid position.

    Raises:
        ValueError: if no row has a response token.
    """
    is_target = labels[:, 1:] != IGNORE_INDEX
    width = int(is_target.sum(dim=1).max()) if is_target.numel() else 0
    if width == 0:
        raise ValueError(
            "labels hold no response token to predict: every label is -100 (or stands in the first column). "
            "Expected the completion's token ids in labels; check max_length and the collator."
        )
    positions = is_target.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    targets = labels[:, 1:].gather(1, positions)
    return positions, targets


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` or DDP has wrapped it."""
    while True:
        if (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def has_adapter(model: nn.Module) -> bool:
    """Whether there is something to switch off: a model under PEFT or under unlearning layers."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def bare_model(model: nn.Module) -> nn.Module:
    """The causal LM of transformers inside wrappers and adapters."""
    model = unwrapped(model)
    return unwrapped(cast(Any, model).get_base_model()) if has_adapter(model) else model


def selects_positions(model: nn.Module) -> bool:
    """Whether the model computes logits at given (B, K) positions only."""
    return _class_selects_positions(type(bare_model(model)))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=32)
def _class_selects_positions(model_class: type[nn.Module]) -> bool:
    return (
        hasattr(transformers.modeling_utils, "slice_logits_to_keep")
        and model_class.__module__.startswith("transformers.")
        and "logits_to_keep" in inspect.signature(model_class.forward).parameters
    )


def logits_at(model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """The logits of a causal LM at `positions` (B, K) of its input: (B, K, V), and no others where the family can.

    The model may be wrapped, or under an adapter that adds no tokens, such as LoRA.
    """
    if selects_positions(model):
        return model(**inputs, logits_to_keep=positions).logits
    logits = model(**inputs).logits
    return logits.take_along_dim(positions[..., None], dim=1)


def is_checkpointing(base_model: nn.Module) -> bool:
    """Whether gradient checkpointing is on and would drop a cache in this forward."""
    return base_model.training and any(getattr(m, "gradient_checkpointing", False) for m in base_model.modules())


@functools.lru_cache(maxsize=64)
def say_once(message: str) -> None:
    logger.warning(message)


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


def needs_gradient(model: nn.Module) -> bool:
    """Whether a forward would record a graph: gradients are on, and something asks for one."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


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
    seen = attention_mask.new_ones(len(input_ids), states.layers[0].seen)
    return logits_at(
        base,
        positions,
        input_ids=input_ids,
        attention_mask=torch.cat([seen, attention_mask], dim=1),
        past_key_values=expand_states(states.layers, base, len(input_ids)),
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
