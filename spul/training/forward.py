"""The unlearning loss of a batch, whatever learns it: a prompt, the whole model, LoRA, or unlearning layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..losses.batch import UnlearnerOutput, batch_loss
from ..losses.unlearning_loss import UnlearningLoss
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
) -> UnlearnerOutput:
    """The unlearning loss of a batch for a model that learns itself: its own weights, LoRA, or unlearning layers.

    A prompt has this as its forward: `unlearner(**batch)`.

    Args:
        model: a causal LM of transformers, or one under `UnlearningLayers` or a PEFT adapter such as LoRA; also
            wrapped for DDP.
        loss: what is asked for.
        input_ids: this and the others: see `SoftPromptUnlearner.forward`. LoRA's frozen model is the one with the
            adapter switched off. The whole model has none once it has learned: give its `reference_logits`, from a
            `ReferenceCache` built before.

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
    return batch_loss(
        loss,
        unlearner.response_logits,
        unlearner.base_logits,
        input_ids,
        labels,
        is_forget,
        attention_mask,
        group_counts,
        num_items_in_batch,
        reference_logits,
    )
