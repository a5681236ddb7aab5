"""Keys and values of prompts, batch size 1, and the inputs that put them in front of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal_lm import autocast_dtype, selects_positions
from ..models.compat import takes_position_ids
from ..models.compat_cache import (
    LayerStates,
    cache_argument,
    empty_cache,
    expanded_cache,
    layer_states,
    padded_prompts,
    returned_cache,
)
from ..models.compat_checkpointing import is_checkpointing, keeps_cache, kept_cache
from ..models.compat_modules import settings_of, weight_versions
from ..models.sharding import gather_before_gradients


@dataclass
class PromptStates:
    """Keys and values of a prompt, and the prompt and the base they were computed from."""

    layers: list[LayerStates]
    logits: Tensor | None = None  # (1, p, V) at the virtual tokens, if they were requested
    prompt: Tensor | None = None  # (1, p, d); None for prefix tuning
    base: tuple = ()  # see `base_version`

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens."""
        return self.layers[0].seen

    def each(self) -> list[PromptStates]:
        """The different prompts of a batch under this one."""
        return [self]

    def prefix_inputs(self, base_model: Any, attention_mask: Tensor, num_sequences: int | None = None) -> dict:
        """Arguments that put the prompt in front of a batch in a forward of the base: mask and filled cache.

        Args:
            base_model: the base.
            attention_mask: (B, n), of the rows without virtual tokens.
            num_sequences: batch size of the cache in `generate`, a multiple of B; B unless given.
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


class MixedStates:
    """Keys and values of the prompts of a batch in which rows have different ones, or none.

    Shorter prompts are padded on the left, where the mask hides them, so that each stands next to its row's tokens:
    a sliding window reaches as far back as it does in a row alone.

    Args:
        states: of the different prompts; None stands for no prompt.
        index: for each row, its entry in `states`.

    Raises:
        ValueError: if there is no prompt among them.
    """

    def __init__(self, states: Sequence[PromptStates | None], index: Sequence[int]) -> None:
        self.states, self.index = list(states), list(index)
        lengths = [0 if one is None else one.num_virtual_tokens for one in self.states]
        self.num_virtual_tokens = max(lengths)
        if not self.num_virtual_tokens:
            raise ValueError("MixedStates need a prompt; a batch without one is run by the base.")
        self.lengths = [lengths[i] for i in self.index]

    def each(self) -> list[PromptStates]:
        """The different prompts of the batch."""
        return [one for one in self.states if one is not None]

    def prefix_inputs(self, base_model: Any, attention_mask: Tensor, num_sequences: int | None = None) -> dict:
        """As `PromptStates.prefix_inputs`; in a forward also the positions, which `generate` takes from the mask."""
        rows, longest, device = len(attention_mask), self.num_virtual_tokens, attention_mask.device
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        in_use = torch.arange(longest, device=device) >= longest - lengths
        mask = torch.cat([in_use.to(attention_mask.dtype), attention_mask], dim=1)
        index = torch.tensor(self.index, device=device)
        if num_sequences is not None:
            index = index.repeat_interleave(num_sequences // rows)
        padded = [None if one is None else one.layers for one in self.states]
        inputs = {
            "attention_mask": mask,
            cache_argument(base_model): expanded_cache(padded_prompts(padded, longest), base_model, len(index), index),
        }
        if num_sequences is None and takes_position_ids(base_model):
            inputs["position_ids"] = (mask.ne(0).cumsum(dim=1) - 1).clamp(min=0)[:, longest:]
        return inputs


@contextmanager
def in_front(base_model: Any, states: PromptStates | MixedStates, attention_mask: Tensor) -> Iterator[dict[str, Any]]:
    """Context manager: the arguments that put prompts in front of a batch in one forward of the base, made inside.

    Args:
        base_model: the base.
        states: of the prompts.
        attention_mask: (B, n), of the rows without virtual tokens.
    """
    inputs = states.prefix_inputs(base_model, attention_mask)
    with kept_cache(base_model, inputs[cache_argument(base_model)]):
        yield inputs | {"use_cache": keeps_cache(base_model)}


def compute_states(
    base: Any,
    prompt: Tensor,
    version: tuple = (),
    with_logits: bool = False,
    token_ids: Tensor | None = None,
) -> PromptStates | None:
    """States of a prompt's embeddings (1, p, d) by a pass of the base; None if the base has no plain cache.

    The pass is over `token_ids` (1, p) where the embeddings are those of tokens, which some families look up in every
    layer.
    """
    last = {"logits_to_keep": 1} if selects_positions(base) and not with_logits else {}
    given = {"inputs_embeds": prompt} if token_ids is None else {"input_ids": token_ids}
    cache = empty_cache(base)
    with kept_cache(base, cache):
        out = base(**given, **{cache_argument(base): cache}, use_cache=keeps_cache(base), **last)
    # Under checkpointing, a forward may return none. A cache that it did not fill has no states.
    layers = layer_states(cache if is_checkpointing(base) else returned_cache(out))
    if layers is not None and torch.is_grad_enabled():
        gather_before_gradients(base, [layer[:2] for layer in layers])
    return None if layers is None else PromptStates(layers, out.logits if with_logits else None, prompt, version)


def packed_states(layers: list[LayerStates], config: Any) -> Tensor:
    """Keys and values of layers in PEFT's layout of prefix tuning, (p, layers * 2 * heads * width), float32.

    Where layers differ in shape, or cache a window's end alone, the rest is 0; no row reads it.

    Args:
        layers: of one prompt.
        config: PEFT's, with the sizes.
    """
    heads, num = config.num_attention_heads, config.num_virtual_tokens
    shape = (num, 2 * config.num_layers, heads, config.token_dim // heads)
    packed = layers[0].keys.new_zeros(shape, dtype=torch.float32)
    for i, layer in enumerate(layers):
        for j, tensor in enumerate((layer.keys, layer.values)):
            _, own_heads, cached, width = tensor.shape
            packed[num - cached :, 2 * i + j, :own_heads, :width] = tensor[0].transpose(0, 1)
    return packed.flatten(1)


def base_version(base: nn.Module, device_type: str) -> tuple:
    """Autocast, weights, buffers, hooks and settings: changes whenever the base may compute other states."""
    return autocast_dtype(device_type), weight_versions(base), settings_of(base)
