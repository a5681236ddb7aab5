"""Reading a causal LM of transformers: logits, hidden states, base and adapter; private APIs only in `compat`."""

from .causal_lm import (
    bare_model,
    detached_base,
    evaluation_mode,
    logits_at,
    max_positions,
    trains_own_weights,
    unwrapped,
)
from .compat import keep_4bit_differentiable
from .output_head import OutputHead, final_states

__all__ = [
    "OutputHead",
    "bare_model",
    "detached_base",
    "evaluation_mode",
    "final_states",
    "keep_4bit_differentiable",
    "logits_at",
    "max_positions",
    "trains_own_weights",
    "unwrapped",
]
