"""Caches of transformers: keys and values in them, those of PEFT's prefixes, and one that holds nothing.

Their classes, the names they go by in forwards, and how PEFT fills them change from version to version.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from peft.utils import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as PEFTS_PREFIXES
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .causal_lm import decoder_layers
from .compat_checkpointing import put_prompts
from .compat_devices import device_of


class LayerStates(NamedTuple):
    """Keys and values of one attention layer, batch size 1."""

    keys: Tensor  # (1, heads, cached, head width); a sliding-window layer caches its last window - 1 positions
    values: Tensor
    seen: int  # positions processed, cached or not


# The cache's name in arguments and outputs: transformers 5.24 renames it, and warns at every use of the old name.
CACHE_NAME = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def cache_argument(base_model: Any) -> str:
    """The cache's name in a base's forward. A model's own code may keep the old name beside a newer transformers."""
    old = "past_key_values"
    return old if old in inspect.signature(type(base_model).forward).parameters else CACHE_NAME


def returned_cache(out: Any) -> Any:
    """The cache in a forward's output; None without one."""
    return getattr(out, CACHE_NAME, None)


# Before 5.23, `prefill_chunk_size` cuts the attention mask as if nothing were cached, and leaves the prompt out.
CHUNKS_FOLLOW_CACHE = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)


# Subclasses hold more than keys and values, so exact types are compared.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def layer_states(cache: Any) -> list[LayerStates] | None:
    """The layers of a filled `DynamicCache`; None for any other cache."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(type(x) in _PLAIN_LAYERS and x.is_initialized for x in layers):
        return None
    return [LayerStates(layer.keys, layer.values, layer.get_seq_length()) for layer in layers]


def empty_cache(base_model: Any) -> DynamicCache:
    """A new cache for a base, with a layer of the right kind for each of its own."""
    return DynamicCache(config=base_model.config.get_text_config())


def padded_prompts(prompts: Sequence[list[LayerStates] | None], seen: int) -> list[LayerStates]:
    """Layers of several prompts with a batch of one row each, shorter ones and None padded with zeros on the left.

    Args:
        prompts: layers of each, batch size 1; None for a row without a prompt.
        seen: positions of the longest.
    """

    def stacked(states: list[Tensor | None]) -> Tensor:
        given = [one for one in states if one is not None]
        rows = given[0].new_zeros(len(states), given[0].shape[1], max(t.shape[2] for t in given), given[0].shape[3])
        return torch.cat(
            [
                row if one is None else torch.cat([row[:, :, : row.shape[2] - one.shape[2]], one], dim=2)
                for row, one in zip(rows.split(1), states, strict=True)
            ]
        )

    num_layers = next(len(layers) for layers in prompts if layers is not None)
    return [
        LayerStates(
            stacked([None if layers is None else layers[i].keys for layers in prompts]),
            stacked([None if layers is None else layers[i].values for layers in prompts]),
            seen,
        )
        for i in range(num_layers)
    ]


def expanded_cache(
    layers: list[LayerStates], base_model: Any, batch_size: int, index: Tensor | None = None
) -> DynamicCache:
    """A new cache in which each of `batch_size` rows has seen a prompt. It grows with use: do not reuse it.

    The layers hold views of the prompt, copied only when a forward appends the rows' own tokens: `update` would copy
    them once more, of each layer.

    Args:
        layers: of one prompt, or of several, see `padded_prompts`.
        base_model: the base.
        batch_size: number of rows.
        index: (B,), for each row its prompt; needed where there are several.
    """
    cache = empty_cache(base_model)
    filled: list[Any] = cache.layers
    for layer, states in zip(filled, layers, strict=True):
        keys, values = states.keys, states.values
        if type(layer) in _PLAIN_LAYERS:
            _initialize(layer, keys)
        else:  # which initializes a kind that holds more than keys and values; one that takes none, as Mamba's, raises
            layer.update(keys[:1], values[:1])
        if isinstance(layer, DynamicSlidingWindowLayer):
            # A prompt longer than the window leaves only its end, but its whole length counts for positions.
            layer.cumulative_length = states.seen
            if keys.shape[2] >= layer.sliding_window:
                keys, values = (t[:, :, 1 - layer.sliding_window :] for t in (keys, values))
        put_prompts(layer, keys, values, batch_size, index)
    return cache


def _initialize(layer: Any, keys: Tensor) -> None:
    """Initialize an empty layer of a cache, as `lazy_initialization` does, but for the two empty tensors it makes.

    transformers 5.24 does without `dtype`.
    """
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(keys.device)


# ---- prefixes ----

# Families whose prefixes PEFT fits to layers, beside `PEFTS_PREFIXES`: cut to a window, or to a layer's shape.
_PREFIX_FITTED = ("gemma2", "gemma3_text", "gemma4")


def prefix_states(model: Any) -> list[LayerStates] | None:
    """Keys and values of the active prefix, those of `layer_states(model.get_prompt(batch_size=1))`.

    Here they are views of the encoder's output; PEFT copies them into a cache, by several operators a layer, forward
    and backward. Where it does more to them than that, its own way is taken.

    Args:
        model: a PEFT model whose active adapter is prefix tuning or a cartridge.
    """
    base, config, name = model.get_base_model(), model.active_peft_config, model.active_adapter
    if (
        config.num_transformer_submodules != 1
        or model.config.model_type in PEFTS_PREFIXES
        or any(family in base.config.model_type for family in _PREFIX_FITTED)
    ):
        return _where_layers_are(base, layer_states(_without_device_map(model).get_prompt(batch_size=1)))
    encoder, num = model.prompt_encoder[name], config.num_virtual_tokens
    if config.inference_mode:
        prefix = encoder.embedding.weight[None]
    else:
        prefix = encoder(model.prompt_tokens[name][None, :num].to(next(encoder.parameters()).device))
    if model.base_model_torch_dtype is not None:
        prefix = prefix.to(model.base_model_torch_dtype)
    sizes = (2 * config.num_layers, config.num_attention_heads, -1)
    states = prefix.unflatten(-1, sizes).permute(2, 0, 3, 1, 4).unbind()
    cache = DynamicCache()
    for keys, values in zip(states[::2], states[1::2], strict=True):
        layer = DynamicLayer()
        _initialize(layer, keys)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return _where_layers_are(base, layer_states(cache))


def _without_device_map(model: Any) -> Any:
    """A view of a PEFT model that puts a prefix on no layer's device: PEFT looks for a GPU in any map of devices."""
    base = model.get_base_model()
    if not hasattr(base, "hf_device_map"):
        return model
    view, bare = copy.copy(model), copy.copy(base)
    del bare.hf_device_map
    view._modules = {**model._modules, "base_model": bare}
    return view


def _where_layers_are(base_model: Any, layers: list[LayerStates] | None) -> list[LayerStates] | None:
    """Keys and values on the devices of their layers, where `device_map` has put layers on several."""
    if layers is None or not hasattr(base_model, "hf_device_map"):
        return layers
    # Layers that share the keys of others come last, and have no states of their own.
    devices = [device_of(layer) for layer in decoder_layers(base_model)][: len(layers)]
    return [
        LayerStates(one.keys.to(device), one.values.to(device), one.seen)
        for one, device in zip(layers, devices, strict=True)
    ]


# ---- a cache that holds nothing: the keys and values of the last row stand in front of those of every row ----


def cache_of_last_row(base_model: Any, num_tokens: int) -> DynamicCache:
    """A cache for one forward of a base, whose rows attend to the first `num_tokens` of the last row.

    It holds no tensor, so that a layer which runs again, under gradient checkpointing, finds it as it was.
    """
    cache: Any = empty_cache(base_model)
    cache.layers = [_LastRow(num_tokens, layer.is_sliding) for layer in cache.layers]
    return cache


class _LastRow(DynamicLayer):
    def __init__(self, num_tokens: int, is_sliding: bool) -> None:
        super().__init__()
        self.num_tokens, self.is_sliding = num_tokens, is_sliding

    def get_seq_length(self) -> int:
        return self.num_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _in_front(key_states, self.num_tokens), _in_front(value_states, self.num_tokens)


def _in_front(states: Tensor, num_tokens: int) -> Tensor:
    """Keys or values (B, heads, num_tokens + n, width): the last row's first ones, then those of each row."""
    return _LastRowInFront.apply(states, num_tokens)


class _LastRowInFront(torch.autograd.Function):
    """Written out, since autograd's own backward pass of it would launch twice as many operators, in every layer."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, num_tokens: int) -> Tensor:
        ctx.num_tokens = num_tokens
        return torch.cat([states[-1:, :, :num_tokens].expand(len(states), -1, -1, -1), states], dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        front, own = gradients[0].tensor_split([ctx.num_tokens], dim=2)
        own = own.clone()  # autograd may use the whole gradient elsewhere
        own[-1, :, : ctx.num_tokens].add_(front.sum(dim=0))
        return own, None
