"""Hidden states of the last layer before the answer: the input of t-SNE pictures and linear probes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ...data.checks import check_rows
from ...data.encoder import RowEncoder
from ...models.causal_lm import bare_model
from ...models.unlearner import unlearner_of
from .batches import ResponseBatch, map_responses
from .scoring import check_not_diverged, response_logits


@torch.no_grad()
def response_embeddings(
    model: nn.Module, rows: Dataset, encoder: RowEncoder, batch_size: int = 32, progress: str | None = None
) -> np.ndarray:
    """Last-layer hidden states that predict each row's first response token: the input of the LM head.

    Args:
        model: a causal LM, bare, under LoRA, unlearning layers or a prompt of spul.
        rows: `prompt` and `completion`.
        encoder: turns rows into token ids.
        batch_size: rows per forward pass; batches hold rows of similar length.
        progress: label of a progress bar; None shows none.

    Returns:
        (rows, d), float32.

    Raises:
        TypeError: if the rows are no `datasets.Dataset`.
        ValueError: if there are no rows, the model has no output embeddings, or it has diverged: its hidden states are
            NaN; for prompts by row on a family that concatenates them and computes logits at every position.
    """
    check_rows(rows, columns=())
    base: Any = bare_model(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings; expected a causal LM.")
    inputs: list[Tensor] = []

    def measure(batch: ResponseBatch) -> Tensor:
        inputs.clear()
        response_logits(model, batch.inputs, batch.positions, batch.adapter_names)
        states = inputs[-1]  # the rows' pass; a prompt that runs by itself comes before it
        if states.shape[1] != batch.positions.shape[1]:
            # This family computes logits at every position, maybe behind virtual tokens.
            in_front = states.shape[1] - batch.inputs["input_ids"].shape[1]
            unlearner = unlearner_of(model)
            by_row = unlearner.reads_tokens or (unlearner.takes_adapter_names and batch.adapter_names is not None)
            if in_front and by_row:
                raise ValueError(
                    f"{type(bare_model(model)).__name__} has hidden states at virtual tokens of different numbers in "
                    "front of the rows; measure the rows of one prompt at a time."
                )
            states = states.take_along_dim((batch.positions + in_front)[..., None].to(states.device), dim=1)
        check_not_diverged(states[:, 0].abs(), "hidden states")
        return states[:, 0].float().cpu()

    hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        return torch.stack(map_responses(model, rows, encoder, measure, batch_size, progress)).numpy()
    finally:
        hook.remove()
