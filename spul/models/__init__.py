"""What is read off a causal LM of transformers, and the private or changing APIs that this leans on."""

from .causal_lm import as_it_was, bare_model, evaluation_mode, learns_itself, logits_at, max_positions, unwrapped
from .compat import keep_4bit_differentiable
from .output_head import OutputHead, final_states

__all__ = [
    "OutputHead",
    "as_it_was",
    "bare_model",
    "evaluation_mode",
    "final_states",
    "keep_4bit_differentiable",
    "learns_itself",
    "logits_at",
    "max_positions",
    "unwrapped",
]
