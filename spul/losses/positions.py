"""The prompted forward: the prompt runs once, and every row of the batch attends to its keys and values.

A prompt stands in front of a causal model's input, so what it computes does not depend on the input. Prompt tuning and
P-tuning therefore pass through the model once per step with batch size 1, gradient included; prefix tuning *is* keys
and values and needs no pass. Without gradient, what the pass gave is kept for the next call. Where a cache cannot be
had, the prompt is concatenated to every row instead.
"""

from __future__ import annotations

import logging

from torch import Tensor

from .terms import IGNORE_INDEX

logger = logging.getLogger(__name__)


def pack_right(attention_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Move the real tokens of every row to its start, in order, whatever side was padded.

    Args:
        attention_mask: (B, n), 1 for real tokens.
        tensors: (B, n) each, carried along.

    Returns:
        The packed mask and tensors.
    """
    order = attention_mask.ne(0).long().argsort(dim=1, descending=True, stable=True)
    return [tensor.gather(1, order) for tensor in (attention_mask, *tensors)]


def has_left_padding(attention_mask: Tensor) -> bool:
    """Whether some row has a real token right of a pad."""
    return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def response_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the response tokens are predicted: one position before each, as in every causal language model.

    A label in the first column has no token before it and is not used, as in transformers' own loss.

    Args:
        labels: (B, n), -100 where there is nothing to predict.

    Returns:
        `positions` (B, K) and `targets` (B, K): slot k of row b is the k-th response token of the row; K is the
        largest number of response tokens in a row, unused slots have the target -100 and some valid position.

    Raises:
        ValueError: if no row has a response token.
    """
    is_target = labels[:, 1:] != IGNORE_INDEX
    width = int(is_target.sum(dim=1).max()) if is_target.numel() else 0
    if width == 0:
        raise ValueError(
            "labels hold no response token to predict: every label is -100 (or stands in the first column). "
            "Expected the completion's token ids in labels; check max_length and the collator."
        )
    positions = is_target.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    targets = labels[:, 1:].gather(1, positions)
    return positions, targets
