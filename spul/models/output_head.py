"""The last step of a causal LM: from final hidden states to logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .causal_lm import unwrapped
from .compat import without_peft_wrapper


class OutputHead:
    """Maps a causal LM's final hidden states to its logits: output embeddings, scaling, soft-capping.

    A head with parameters that require gradients is copied, so that later updates do not separate it from the states.
    An adapter on the head is ignored.

    Args:
        base_model: a causal LM of transformers.

    Raises:
        ValueError: if it has no output embeddings.
    """

    def __init__(self, base_model: nn.Module) -> None:
        base: Any = unwrapped(base_model)
        embeddings = without_peft_wrapper(base.get_output_embeddings())
        if embeddings is None:
            raise ValueError(f"{type(base).__name__} has no output embeddings; use reference='live'.")
        if any(parameter.requires_grad for parameter in embeddings.parameters()):
            embeddings = copy.deepcopy(embeddings).requires_grad_(False)
        config = base.config.get_text_config()
        self.embeddings = embeddings
        dtype = embeddings.weight.dtype
        self.dtype = dtype if dtype.is_floating_point else None  # None: quantized
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., d), on the head's device."""
        states = states.to(self.embeddings.weight.device)
        logits = self.embeddings(states if self.dtype is None else states.to(self.dtype))
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class NoHead:
    """The head for a loss that reads hidden states: the identity."""

    dtype: torch.dtype | None = None

    def __call__(self, states: Tensor) -> Tensor:
        return states


def final_states(base_model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """A causal LM's final hidden states, the input of its LM head, at `positions` (B, K): (B, K, d).

    Raises:
        ValueError: if the model does not return them.
    """
    decoder: Any = unwrapped(base_model)
    states = getattr(decoder.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    if states is None:
        raise ValueError(f"{type(decoder).__name__} returns no final hidden states; use reference='live'.")
    return states.take_along_dim(positions[..., None].to(states.device), dim=1)
