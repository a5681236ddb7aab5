"""The output head of a causal LM: logits from final hidden states."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .causal_lm import unwrapped
from .compat import without_peft_wrapper


class OutputHead:
    """Logits from a causal LM's final hidden states: output embeddings, then scaling and soft-capping.

    A trainable head is copied, so that it keeps matching cached states; an adapter on it is not applied.

    Args:
        base_model: a causal LM of transformers.

    Raises:
        ValueError: if it has no output embeddings.
    """

    def __init__(self, base_model: nn.Module) -> None:
        base: Any = unwrapped(base_model)
        embeddings = base.get_output_embeddings()
        if embeddings is None:
            raise ValueError(f"{type(base).__name__} has no output embeddings; use reference='live'.")
        embeddings = without_peft_wrapper(embeddings)
        if any(parameter.requires_grad for parameter in embeddings.parameters()):
            embeddings = copy.deepcopy(embeddings).requires_grad_(False)
        config = base.config.get_text_config()
        self.embeddings = embeddings
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None if they are quantized."""
        dtype = self.embeddings.weight.dtype
        return dtype if dtype.is_floating_point else None

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """Return logits (..., V) of final hidden states (..., d), on the device of the head."""
        states = states.to(self.embeddings.weight.device)
        logits = self.embeddings(states if self.dtype is None else states.to(self.dtype))
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def final_states(base_model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """Final hidden states (B, K, d), the input of the LM head, at `positions` (B, K).

    Raises:
        ValueError: if the model does not return its final hidden states.
    """
    decoder: Any = unwrapped(base_model)
    states = getattr(decoder.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    if states is None:
        raise ValueError(f"{type(decoder).__name__} does not return its final hidden states; use reference='live'.")
    return states.take_along_dim(positions[..., None].to(states.device), dim=1)


def reproduces_logits(head: OutputHead, states: Tensor, expected: Tensor) -> bool:
    """Whether the head computes the model's own logits from the states, up to rounding."""
    rounding = 2 * torch.finfo(expected.dtype).eps if expected.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return is_close(head(states), expected, rounding)


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is at most `tolerance` times the largest expected value."""
    found, expected = found.double(), expected.double().to(found.device)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
