"""A cache that holds nothing: the keys and values of a batch's last row stand in front of those of every row.

The classes of caches are transformers' own, and change from version to version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .compat import empty_cache


def cache_of_last_row(base_model: Any, num_tokens: int) -> DynamicCache:
    """A cache for one forward of a base, whose rows attend to the first `num_tokens` of the last row.

    It holds no tensor, so that a layer which runs again, under gradient checkpointing, finds it as it was.
    """
    cache: Any = empty_cache(base_model)
    cache.layers = [_LastRow(num_tokens, layer.is_sliding) for layer in cache.layers]
    found: DynamicCache = cache
    return found


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
    found: Tensor = _LastRowInFront.apply(states, num_tokens)
    return found


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
