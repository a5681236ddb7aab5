"""One pass of the base for prompt and rows: the prompt is a row of the batch, and the others attend to its keys.

A step of `step_time.py` (`--steps spul "spul, one pass" floor`). spul's own step has a pass of the prompt and a pass
of the rows. This one has little more than half the operators of a deep model's step, and one more row, as wide as the
others. A GPU that waits for operators to be launched may gain by it; a CPU waits for none, and loses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from spul import SoftPromptUnlearner
from spul.models.causal_lm import logits_at
from spul.models.compat import cache_argument, empty_cache, takes_position_ids


class OnePass(SoftPromptUnlearner):
    """An unlearner whose prompt is the last row of each batch that it trains on."""

    def response_logits(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self.enabled:
            return super().response_logits(input_ids, attention_mask, positions, *args, **kwargs)
        base, prompt = self.get_base_model(), self.get_prompt(batch_size=1)
        return joint_logits(base, self.word_embeddings(input_ids), attention_mask, positions, prompt)


def joint_logits(base: Any, embeds: Tensor, attention_mask: Tensor, positions: Tensor, prompt: Tensor) -> Tensor:
    """Logits (B, K, V) of rows behind a prompt, in one pass.

    Args:
        base: a causal LM whose layers take keys and values as a cache returns them.
        embeds: of the rows, right-padded, (B, n, d).
        attention_mask: (B, n).
        positions: (B, K), counted without virtual tokens.
        prompt: embeddings of the prompt, (1, p, d).
    """
    rows, num = len(embeds), prompt.shape[1]
    width = max(embeds.shape[1], num)
    embeds, prompt = (F.pad(tensor.to(embeds), (0, 0, 0, width - tensor.shape[1])) for tensor in (embeds, prompt))
    own = F.pad(attention_mask, (0, width - attention_mask.shape[1]))
    # Columns: the prompt's tokens, then the row's own. The prompt's row has its tokens among its own.
    mask = torch.cat([F.pad(own, (num, 0), value=1), (torch.arange(num + width) // num == 1).to(own)[None]])
    inputs: dict[str, Any] = {cache_argument(base): _cache_of_last_row(base, num)}
    if takes_position_ids(base):
        first = torch.tensor([num] * rows + [0], device=embeds.device)
        inputs["position_ids"] = first[:, None] + torch.arange(width, device=embeds.device)
    positions = F.pad(positions, (0, 0, 0, 1))  # the prompt's row predicts nothing
    joint = torch.cat([embeds, prompt])
    return logits_at(base, positions, inputs_embeds=joint, attention_mask=mask, use_cache=True, **inputs)[:rows]


def _cache_of_last_row(base: Any, num: int) -> Cache:
    return Cache(layers=[_LastRow(num, layer.is_sliding) for layer in empty_cache(base).layers])


class _LastRow(DynamicLayer):
    """A layer that caches nothing, and puts the first keys and values of the last row in front of all rows."""

    def __init__(self, num_virtual_tokens: int, is_sliding: bool) -> None:
        super().__init__()
        self.num, self.is_sliding = num_virtual_tokens, is_sliding

    def get_seq_length(self) -> int:
        return self.num

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._behind(key_states), self._behind(value_states)

    def _behind(self, states: Tensor) -> Tensor:
        return torch.cat([states[-1:, :, : self.num].expand(len(states), -1, -1, -1), states], dim=2)
