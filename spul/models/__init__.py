"""What is read off a causal LM of transformers, and the private or changing APIs that this leans on."""

from .causal_lm import bare_model, evaluation_mode, logits_at, max_positions, unwrapped
from .compat import keep_4bit_differentiable
from .output_head import OutputHead, final_states
from .unlearner import Unlearner, base_of, unlearner_of

__all__ = [
    "OutputHead",
    "Unlearner",
    "bare_model",
    "base_of",
    "evaluation_mode",
    "final_states",
    "keep_4bit_differentiable",
    "logits_at",
    "max_positions",
    "unlearner_of",
    "unwrapped",
]
