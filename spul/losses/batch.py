"""The unlearning loss of a batch, for any trained model: a prompt, layers, LoRA, or the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .positions import pack_right, response_positions, token_positions
from .terms import IGNORE_INDEX
from .unlearning_loss import UnlearningLoss, num_forget_rows

LogitsFunction = Callable[..., Tensor]
"""Maps `input_ids` (B, n), `attention_mask` (B, n) and `positions` (B, K) to logits (B, K, V).

For a loss of terms that read hidden states, to those of its layer: (B, K, d).
"""


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
            With alpha = beta = 0 and gradients on, B counts the forget rows only. Where the terms read hidden states,
            these at all tokens, (B, n, d).
        response_labels: (B, K), those response tokens, or all tokens; -100 in unused slots.
        retain_excess: scalar, this batch's part of the step's mean excess of the retain loss over the base's own, in
            nats per token; with `retain_budget` only. `RetainMultiplier.update` reads it.
        retain_share: scalar, the share of the step's retain rows that are in this batch, likewise.
    """

    loss: Tensor | None = None
    forget_loss: Tensor | None = None
    retain_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    lm_loss: Tensor | None = None
    logits: Tensor | None = None
    response_labels: Tensor | None = None
    retain_excess: Tensor | None = None
    retain_share: Tensor | None = None


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
    alpha: Tensor | float | None = None,
    is_rejected: Tensor | None = None,
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
        alpha: the weight of the retain term under a budget, `RetainMultiplier.alpha`.
        is_rejected: (B,) bool, of the rows of pairs, see `UnlearningLoss`.
        prompt_position: (B,), passed to `response_logits` by name unless it is None.

    Raises:
        ValueError: if shapes do not match, `is_forget` holds other numbers than 0 and 1, or `alpha` is missing under a
            budget or given without one.
    """
    _check_batch(input_ids, labels, is_forget)
    if alpha is None and loss.retain_budget is not None:
        raise ValueError(
            f"the loss has retain_budget={loss.retain_budget}, under which alpha moves from step to step: pass "
            "alpha=multiplier.alpha, of a multiplier = RetainMultiplier(loss), and call multiplier.update(out) after "
            "each step."
        )
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    attention_mask, input_ids, labels = pack_right(attention_mask, input_ids, labels)
    positions, targets = response_positions(labels)
    if loss.reads_layer is not None:
        positions, targets = token_positions(input_ids, attention_mask)
    is_forget = is_forget.bool()
    is_rejected = None if is_rejected is None else is_rejected.bool()
    needed = loss.rows_needing_reference(is_forget)
    if reference_logits is not None:
        _check_reference(reference_logits, int(needed.sum()), targets.shape[1])
    rows_of_groups = torch.stack([num_forget_rows(is_forget, is_rejected), (~is_forget).sum()]).float()
    counts = _divisors(rows_of_groups, labels, group_counts, num_items_in_batch)
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
        labels, is_rejected = labels[rows], None if is_rejected is None else is_rejected[rows]
        at = {name: x[rows] for name, x in at.items()}

    text_logits, text_labels = None, None
    if loss.gamma > 0 and is_forget.any():
        # One pass for both: logits at all positions, of which those of the responses are selected.
        every_position = torch.arange(input_ids.shape[1] - 1, device=input_ids.device).expand(len(input_ids), -1)
        all_logits = response_logits(input_ids, attention_mask, every_position, **at)
        logits = all_logits.take_along_dim(positions[..., None], dim=1)
        text_logits = all_logits[is_forget]
        in_request = (attention_mask != 0) & (labels == IGNORE_INDEX)
        text_labels = input_ids.masked_fill(~in_request, IGNORE_INDEX)[is_forget, 1:]
    else:
        logits = response_logits(input_ids, attention_mask, positions, **at)
        if loss.gamma > 0:
            text_logits, text_labels = logits[:0], targets[:0]
    if reference_logits is None and needed.any():
        with torch.no_grad():
            reference_logits = base_logits(input_ids[needed], attention_mask[needed], positions[needed])
    out = loss(logits, targets, is_forget, reference_logits, *counts, text_logits, text_labels, is_rejected, alpha)
    found = UnlearnerOutput(out.loss, out.forget_loss, out.retain_loss, out.kl_loss, out.lm_loss, logits, targets)
    if loss.retain_budget is not None:
        found.retain_excess = loss.retain_excess(logits, targets, is_forget, reference_logits, counts[1])
        found.retain_share = ((~is_forget).sum() / counts[1]).to(found.retain_excess)
    return found


def _check_batch(input_ids: Tensor, labels: Tensor, is_forget: Tensor) -> None:
    if labels.shape != input_ids.shape or is_forget.shape != input_ids.shape[:1]:
        raise ValueError(
            f"shapes do not match: input_ids {tuple(input_ids.shape)}, labels {tuple(labels.shape)}, is_forget "
            f"{tuple(is_forget.shape)}; expected (B, n), (B, n) and (B,)."
        )
    if is_forget.dtype != torch.bool and not bool(((is_forget == 0) | (is_forget == 1)).all()):
        raise ValueError(f"is_forget={is_forget.tolist()}; expected (B,) of bools, or of 0 and 1.")


def _check_reference(reference_logits: Tensor, num_rows: int, num_slots: int) -> None:
    if reference_logits.shape[:2] != (num_rows, num_slots):
        raise ValueError(
            f"reference_logits have the shape {tuple(reference_logits.shape)}; expected ({num_rows}, {num_slots}, "
            "vocabulary): the rows whose loss compares with the base model, and a slot for each response token, as "
            "ReferenceCache.logits(batch) returns them."
        )


def _divisors(
    counts: Tensor, labels: Tensor, group_counts: Tensor | None, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """The divisors of the sums over forget rows and over retain rows: those given, or by their `counts` here."""
    if group_counts is not None:
        if not isinstance(group_counts, Tensor) or group_counts.shape != counts.shape:
            raise ValueError(
                f"group_counts={group_counts!r}; expected a tensor of two numbers, of the forget and of the retain "
                "rows of the whole step, as spul.training.step_counts(batches) returns."
            )
        counts = group_counts
    elif num_items is not None:
        counts = counts * num_items / labels[:, 1:].ne(IGNORE_INDEX).sum()
    return cast(tuple[Tensor, Tensor], counts.clamp(min=torch.finfo(torch.float32).tiny).unbind())
