"""The unlearning loss of a batch for the full model, LoRA or unlearning layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..losses.batch import UnlearnerOutput, batch_loss
from ..losses.unlearning_loss import UnlearningLoss
from ..models.unlearner import unlearner_of


def unlearning_forward(model: nn.Module, loss: UnlearningLoss, **batch: Any) -> UnlearnerOutput:
    """The unlearning loss of a batch when the full model, LoRA or unlearning layers are trained.

    For a prompt it is the unlearner's own forward, `unlearner(**batch)`.

    Args:
        model: a causal LM of transformers, bare, under `UnlearningLayers` or under a PEFT adapter such as LoRA; also
            wrapped for DDP.
        loss: the objective.
        batch: `input_ids`, `labels`, `is_forget` and, optionally, `attention_mask`, `row_id`, `group_counts`,
            `num_items_in_batch` and `reference_logits`; see `SoftPromptUnlearner.forward`. The reference of LoRA and
            layers is the model with the adapter disabled. A fully fine-tuned model has none left: pass
            `reference_logits`, from a `ReferenceCache` built before training.

    Raises:
        ValueError: if shapes do not match, or `reference_logits` are needed and cannot be computed.

    Example:
        ```python
        reference = ReferenceCache.build(model, dataset, collator, loss=loss)  # before the first step
        batch = collator(rows)
        out = unlearning_forward(model, loss, **batch, reference_logits=reference.logits(batch))
        out.loss.backward()
        ```
    """

    unlearner = unlearner_of(model)
    return batch_loss(loss, unlearner.response_logits, unlearner.base_logits, **batch)
