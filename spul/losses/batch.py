"""The unlearning loss of a batch, for any trained model: a prompt, layers, LoRA, or the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .positions import pack_right, response_positions
from .terms import IGNORE_INDEX
from .unlearning_loss import UnlearningLoss

LogitsFunction = Callable[..., Tensor]
"""Maps `input_ids` (B, n), `attention_mask` (B, n) and `positions` (B, K) to logits (B, K, V)."""


@dataclass
class UnlearnerOutput(ModelOutput):
    """The output of a forward with `is_forget`.

    Attributes:
        loss: scalar, `forget_loss + alpha * retain_loss + beta * kl_loss + gamma * lm_loss`.
        forget_loss: scalar, L_f; exactly 0 without forget rows.
        retain_loss: scalar, L_r; exactly 0 without retain rows.
        kl_loss: scalar, L_kl; exactly 0 without retain rows.
        lm_loss: scalar, L_lm; exactly 0 without forget rows, and where gamma is 0.
        logits: (B, K, V); slot k of row b predicts the row's k-th response token. Other positions are not computed.
            With alpha = beta = 0 and gradients on, B counts the forget rows only.
        response_labels: (B, K), those response tokens; -100 in unused slots.
    """

    loss: Tensor | None = None
    forget_loss: Tensor | None = None
    retain_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    lm_loss: Tensor | None = None
    logits: Tensor | None = None
    response_labels: Tensor | None = None


def batch_loss(
    loss: UnlearningLoss,
    response_logits: LogitsFunction,
    base_logits: LogitsFunction,
    input_ids: Tensor,
    labels: Tensor,
    is_forget: Tensor,
    attention_mask: Tensor | None = None,
    group_counts: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    reference_logits: Tensor | None = None,
    row_id: Tensor | None = None,
    prompt_position: Tensor | None = None,
) -> UnlearnerOutput:
    """Return the unlearning loss of a batch.

    Args:
        loss: the objective.
        response_logits: computes logits of the trained model.
        base_logits: computes logits of the base model; called without gradient, and only if `reference_logits` are
            needed and not given.
        input_ids: for this and the others see `SoftPromptUnlearner.forward`.
        row_id: not used; the collator returns it.
        prompt_position: (B,), passed to `response_logits` by name unless it is None.

    Raises:
        ValueError: if shapes do not match, or `is_forget` holds other numbers than 0 and 1.
    """
    if labels.shape != input_ids.shape or is_forget.shape != input_ids.shape[:1]:
        raise ValueError(
            f"shapes do not match: input_ids {tuple(input_ids.shape)}, labels {tuple(labels.shape)}, is_forget "
            f"{tuple(is_forget.shape)}; expected (B, n), (B, n) and (B,)."
        )
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    attention_mask, input_ids, labels = pack_right(attention_mask, input_ids, labels)
    positions, targets = response_positions(labels)
    if is_forget.dtype != torch.bool and not bool(((is_forget == 0) | (is_forget == 1)).all()):
        raise ValueError(f"is_forget={is_forget.tolist()}; expected (B,) of bools, or of 0 and 1.")
    is_forget = is_forget.bool()
    needed = loss.rows_needing_reference(is_forget)
    if reference_logits is not None and reference_logits.shape[:2] != (int(needed.sum()), targets.shape[1]):
        raise ValueError(
            f"reference_logits have the shape {tuple(reference_logits.shape)}; expected "
            f"({int(needed.sum())}, {targets.shape[1]}, vocabulary): the rows whose loss compares with the base "
            "model, and a slot for each response token, as ReferenceCache.logits(batch) returns them."
        )
    counts = _group_counts(is_forget, targets, group_counts, num_items_in_batch)
    at = {} if prompt_position is None else {"prompt_position": prompt_position}

    if torch.is_grad_enabled() and not loss.uses_retain_rows:
        # Retain rows have no weight, so they are not computed.
        rows = is_forget.nonzero().flatten()
        if len(rows) == 0:
            # One row all the same: backward, and DDP's processes, which wait for each other, need a graph.
            logits = response_logits(
                input_ids[:1], attention_mask[:1], positions[:1], **{name: x[:1] for name, x in at.items()}
            )
            zero = logits.float().sum() * 0.0
            none = zero.detach()
            return UnlearnerOutput(zero, none, none, none, none, logits[:0], targets[:0])
        attention_mask, input_ids, positions = attention_mask[rows], input_ids[rows], positions[rows]
        targets, is_forget, needed = targets[rows], is_forget[rows], needed[rows]
        labels, at = labels[rows], {name: x[rows] for name, x in at.items()}

    text_logits, text_labels = None, None
    if loss.gamma > 0 and is_forget.any():
        # One pass for both: logits at all positions, of which those of the responses are selected.
        every_position = torch.arange(input_ids.shape[1] - 1, device=input_ids.device).expand(len(input_ids), -1)
        all_logits = response_logits(input_ids, attention_mask, every_position, **at)
        logits = all_logits.take_along_dim(positions[..., None], dim=1)
        text_logits = all_logits[is_forget]
        is_text = (attention_mask != 0) & (labels == IGNORE_INDEX)
        text_labels = input_ids.masked_fill(~is_text, IGNORE_INDEX)[is_forget, 1:]
    else:
        logits = response_logits(input_ids, attention_mask, positions, **at)
        if loss.gamma > 0:
            text_logits, text_labels = logits[:0], targets[:0]
    if reference_logits is None and needed.any():
        with torch.no_grad():
            reference_logits = base_logits(input_ids[needed], attention_mask[needed], positions[needed])
    out = loss(logits, targets, is_forget, reference_logits, *counts, text_logits, text_labels)
    return UnlearnerOutput(out.loss, out.forget_loss, out.retain_loss, out.kl_loss, out.lm_loss, logits, targets)


def _group_counts(
    is_forget: Tensor, targets: Tensor, group_counts: Tensor | None, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """The divisors of the sums over forget rows and over retain rows."""
    if group_counts is None:
        counts = torch.stack([is_forget.sum(), (~is_forget).sum()]).float()
        if num_items is not None:
            counts = counts * num_items / targets.ne(IGNORE_INDEX).sum()
    else:
        counts = group_counts
    return cast(tuple[Tensor, Tensor], counts.clamp(min=torch.finfo(torch.float32).tiny).unbind())
