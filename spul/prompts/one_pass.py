"""One pass of the base for prompt and rows: the prompt is a row of the batch, and the others attend to its keys.

A pass of the prompt by itself has as many operators as one of a batch, and little to compute. A CPU waits for none of
them; a GPU waits for each to be launched. So training on a GPU takes one pass where that adds few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.causal_lm import logits_at
from ..models.compat import takes_position_ids
from ..models.compat_cache import cache_argument, cache_of_last_row
from ..models.compat_checkpointing import keeps_cache, kept_cache

# Of a step: more would take longer to compute, on a model of 7B parameters, than the launches of a second pass.
MOST_ADDED_TOKENS = 1024


def waits_for_launches(device: torch.device) -> bool:
    """Whether a device runs behind the program, which launches its operators one by one."""
    return device.type not in ("cpu", "meta")


def tokens_of_prompts_row(num_rows: int, num_tokens: int, num_virtual: int) -> int:
    """Tokens, pads among them, that the prompt's row adds to a batch (`num_rows`, `num_tokens`)."""
    return (num_rows + 1) * max(num_tokens, num_virtual) - num_rows * num_tokens


def joint_logits(base: Any, embeds: Tensor, attention_mask: Tensor, positions: Tensor, prompt: Tensor) -> Tensor:
    """Logits (B, K, V) of rows behind a prompt, in one pass.

    Args:
        base: a causal LM whose layers take keys and values as a cache returns them.
        embeds: of the rows, right-padded, (B, n, d).
        attention_mask: (B, n).
        positions: (B, K), counted without virtual tokens.
        prompt: embeddings of the prompt, (1, p, d).
    """
    rows, own_width, num = *embeds.shape[:2], prompt.shape[1]
    width = max(own_width, num)
    embeds, prompt = (F.pad(tensor.to(embeds), (0, 0, 0, width - tensor.shape[1])) for tensor in (embeds, prompt))
    own = F.pad(attention_mask, (0, width - attention_mask.shape[1]))
    # Columns: the prompt's tokens, then the row's own. The prompt's row has its tokens among its own.
    mask = torch.cat(
        [F.pad(own, (num, 0), value=1), (torch.arange(num + width, device=own.device) // num == 1).to(own)[None]]
    )
    cache = cache_of_last_row(base, num)
    inputs: dict[str, Any] = {cache_argument(base): cache, "use_cache": keeps_cache(base)}
    if takes_position_ids(base):
        behind = torch.arange(rows + 1, device=embeds.device)[:, None] < rows
        every = num * behind + torch.arange(width, device=embeds.device)
        # Pads after short rows stay within the positions of prompt and rows, which may be all that the base has.
        inputs["position_ids"] = every.clamp(max=num + own_width - 1)
    positions = F.pad(positions, (0, 0, 0, 1))  # the prompt's row predicts nothing
    with kept_cache(base, cache):
        joint = torch.cat([embeds, prompt])
        return logits_at(base, positions, inputs_embeds=joint, attention_mask=mask, **inputs)[:rows]
