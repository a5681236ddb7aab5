"""The unlearning loss of a batch for the full model, LoRA or unlearning layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..losses.batch import UnlearnerOutput, batch_loss
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import as_it_was, learns_itself, logits_at


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
    """The unlearning loss of a batch when the full model, LoRA or unlearning layers are trained.

    For a prompt it is the unlearner's own forward, `unlearner(**batch)`.

    Args:
        model: a causal LM of transformers, bare, under `UnlearningLayers` or under a PEFT adapter such as LoRA; also
            wrapped for DDP.
        loss: the objective.
        input_ids: (B, n) token ids; for this and the other inputs see `SoftPromptUnlearner.forward`.
        labels: (B, n).
        is_forget: (B,) bool.
        attention_mask: (B, n).
        row_id: (B,), not used.
        group_counts: (2,), forget and retain rows of the whole step.
        num_items_in_batch: number of response tokens of the whole step, from a plain `Trainer`.
        reference_logits: (R, K, V), from a `ReferenceCache` built before training, where the full model is trained.
            None computes them with the adapter or the layers disabled.

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

    def learned(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        return logits_at(model, positions, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def frozen(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        if learns_itself(model):
            raise ValueError(
                "the loss compares with the model before training, but its own weights are trained: pass "
                "reference_logits, from a ReferenceCache built before training."
            )
        with as_it_was(model) as base:
            return logits_at(base, positions, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    return batch_loss(
        loss,
        learned,
        frozen,
        input_ids,
        labels,
        is_forget,
        attention_mask,
        group_counts,
        num_items_in_batch,
        reference_logits,
    )
