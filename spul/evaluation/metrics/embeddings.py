"""Where a model stands when it is about to answer: its last layer, for pictures of what forgetting moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ...data.collator import ForgetRetainCollator
from ...models.causal_lm import bare_model, evaluation_mode
from .likelihood import response_batches
from .scoring import check_numbers, response_logits


@torch.no_grad()
def response_embeddings(
    model: nn.Module, rows: Dataset, collator: ForgetRetainCollator, batch_size: int = 32, progress: str | None = None
) -> np.ndarray:
    """The last layer's hidden states that predict each row's first response token: what the LM head is given.

    Args:
        model: a causal LM, bare, under LoRA or under a prompt of spul.
        rows: `prompt` and `completion`.
        collator: for tokenizing and padding.
        batch_size: rows per forward; batches are of like length.
        progress: a name to show a progress bar under; none unless given.

    Returns:
        (rows, d), float32.

    Raises:
        ValueError: if there are no rows, the model has no output embeddings, or it has diverged: its hidden states are
            NaN.
    """
    head: Any = bare_model(model)
    head = head.get_output_embeddings()
    if head is None or len(rows) == 0:
        raise ValueError(f"{len(rows)} rows, output embeddings {head}: expected at least one row, and a causal LM.")
    device = next(model.parameters()).device
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    found: dict[int, Tensor] = {}
    try:
        with evaluation_mode(model):
            for batch in response_batches(rows, collator, batch_size, device, progress):
                given.clear()
                response_logits(model, batch.inputs, batch.positions)
                states = given[-1]  # of the rows; a prompt that runs by itself comes before
                if states.shape[1] != batch.positions.shape[1]:
                    # This family computes logits everywhere, maybe behind virtual tokens.
                    in_front = states.shape[1] - batch.inputs["input_ids"].shape[1]
                    places = (batch.positions + in_front)[..., None].to(states.device)
                    states = states.take_along_dim(places, dim=1)
                check_numbers(states[:, 0], "hidden states")
                found |= zip(batch.places, states[:, 0].float().cpu(), strict=True)
    finally:
        hook.remove()
    return torch.stack([found[i] for i in range(len(rows))]).numpy()
