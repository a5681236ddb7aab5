"""The unlearning loss of a batch for the full model, LoRA or unlearning layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..losses.batch import UnlearnerOutput, batch_loss
from ..losses.unlearning_loss import UnlearningLoss, num_forget_rows
from ..models.unlearner import unlearner_of


def unlearning_forward(
    model: nn.Module,
    loss: UnlearningLoss,
    input_ids: Tensor,
    labels: Tensor,
    is_forget: Tensor,
    attention_mask: Tensor | None = None,
    row_id: Tensor | None = None,
    group_counts: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    reference_logits: Tensor | None = None,
    alpha: Tensor | float | None = None,
    is_rejected: Tensor | None = None,
    prompt_position: Tensor | None = None,
) -> UnlearnerOutput:
    """The unlearning loss of a batch when the full model, LoRA or unlearning layers are trained.

    For a prompt it is the unlearner's own forward, `unlearner(**batch)`.

    Args:
        model: a causal LM of transformers, bare, under `UnlearningLayers` or under a PEFT adapter such as LoRA; also
            wrapped for DDP.
        loss: the objective.
        input_ids: this and the others as in `SoftPromptUnlearner.forward`. The reference of LoRA and layers is the
            model with the adapter disabled. A fully fine-tuned model has none left: pass its `reference_logits`, from
            a `ReferenceCache` built before training.
        alpha: under `retain_budget` the weight of the retain term, `RetainMultiplier.alpha`.
        is_rejected: as in `SoftPromptUnlearner.forward`.
        prompt_position: not used but by a prompt; a collator for one returns it.

    Raises:
        TypeError: if the model is a wrapped prompt.
        ValueError: if shapes do not match, `reference_logits` are needed and cannot be computed, or `alpha` is missing
            under a budget.

    Example:
        ```python
        reference = ReferenceCache.build(model, dataset, collator, loss=loss)  # before the first step
        batch = collator(rows)
        out = unlearning_forward(model, loss, **batch, reference_logits=reference.logits(batch))
        out.loss.backward()
        ```
    """
    unlearner = unlearner_of(model)
    if unlearner.computes_loss and unlearner is not model:
        raise TypeError(
            f"the prompt is wrapped, in a {type(model).__name__}, whose hooks, as those that average gradients, run "
            "where it is called itself: model(**batch), with the loss of SoftPromptUnlearner."
        )
    trained, base = unlearner.reads(loss.reads_layer)
    if loss.reads_layer is None:
        trained = unlearner.logits_through(model)
    rows = (input_ids, labels, is_forget, attention_mask, group_counts, num_items_in_batch, reference_logits)
    at = prompt_position if unlearner.takes_prompt_position else None
    out = batch_loss(loss, trained, base, *rows, is_rejected=is_rejected, alpha=alpha, prompt_position=at)
    if out.loss is not None and out.loss.requires_grad:
        unlearner.parameters_changed()
    return out


def step_counts(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The numbers of forget rows, a pair once, and of retain rows in all batches of a step: (2,), its `group_counts`.

    Args:
        batches: as `ForgetRetainCollator` returns them.
    """
    counts = [
        torch.stack([num_forget_rows(batch["is_forget"], batch.get("is_rejected")), (~batch["is_forget"]).sum()])
        for batch in batches
    ]
    return torch.stack(counts).sum(dim=0).float()
