"""Reading a causal LM of transformers: logits, hidden states, base and adapter; private APIs only in `compat`."""

from .causal_lm import bare_model, evaluation_mode, logits_at, max_positions, unwrapped
from .compat import keep_4bit_differentiable
from .output_head import OutputHead, final_states
from .protocol import Unlearner
from .sharding import partition_layers, shard_layers
from .unlearner import detached_base, unlearner_of

__all__ = [
    "OutputHead",
    "Unlearner",
    "bare_model",
    "detached_base",
    "evaluation_mode",
    "final_states",
    "keep_4bit_differentiable",
    "logits_at",
    "max_positions",
    "partition_layers",
    "shard_layers",
    "unlearner_of",
    "unwrapped",
]
