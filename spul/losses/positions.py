"""Positions in rows: right-packed rows, those at which response tokens are predicted, and where requests end."""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import IGNORE_INDEX


def pack_right(attention_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Move the real tokens of every row to its start, in order, for padding on either side.

    Args:
        attention_mask: (B, n), 1 for real tokens.
        tensors: (B, n) each, permuted alike.

    Returns:
        The packed mask and tensors.
    """
    order = attention_mask.ne(0).long().argsort(dim=1, descending=True, stable=True)
    return [tensor.gather(1, order) for tensor in (attention_mask, *tensors)]


def has_left_padding(attention_mask: Tensor) -> bool:
    """Whether some row has a real token right of a pad."""
    return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def response_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions at which a causal LM predicts the response tokens: one before each.

    A label in the first column has no token before it and is not used, as in transformers' own loss.

    Args:
        labels: (B, n), the response's token ids, -100 elsewhere.

    Returns:
        `positions` (B, K) and `targets` (B, K): slot k of row b is the k-th response token of the row; K is the
        largest number of response tokens in a row, unused slots have the target -100 and an arbitrary valid position.

    Raises:
        ValueError: if no row has a response token.
    """
    is_target = labels[:, 1:] != IGNORE_INDEX
    width = int(is_target.sum(dim=1).max()) if is_target.numel() else 0
    if width == 0:
        raise ValueError(
            "labels hold no response token to predict: every label is -100 (or is in the first column). "
            "Expected the completion's token ids in labels; check max_length and the collator."
        )
    positions = is_target.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    targets = labels[:, 1:].gather(1, positions)
    return positions, targets


def token_positions(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of right-packed rows, for terms that read hidden states.

    Args:
        input_ids: (B, n).
        attention_mask: (B, n), 1 for real tokens.

    Returns:
        `positions` (B, n) and `tokens` (B, n), -100 at pads.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return positions, input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)


def own_tokens(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Token ids of each row (B, n) without its pads."""
    return [ids[own.bool()].tolist() for ids, own in zip(input_ids, attention_mask, strict=True)]


def ends_before_labels(labels: Tensor, attention_mask: Tensor) -> list[int]:
    """For each row (B, n) the number of its own tokens before its first label: its request; 0 without labels."""
    are_labels = [row[own.bool()] != IGNORE_INDEX for row, own in zip(labels, attention_mask, strict=True)]
    return [int(row.long().argmax()) if bool(row.any()) else 0 for row in are_labels]


def ends_before_responses(positions: Tensor, labels: Tensor | None = None) -> list[int]:
    """For each row the number of tokens up to the first of its positions: its request; 0 for a text without one.

    Args:
        positions: (B, K), as of `response_positions`.
        labels: (B, n). A row with a label in the first column is a text without a request: by its positions it is like
            a request of one token.
    """
    ends = positions[:, 0] + 1
    return (ends if labels is None else ends.where(labels[:, 0] == IGNORE_INDEX, 0)).tolist()
