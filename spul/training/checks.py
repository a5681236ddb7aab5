"""Checks of UnlearningTrainer before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data.checks import check_row_ids
from ..data.collator import ForgetRetainCollator
from ..losses.unlearning_loss import UnlearningLoss
from ..models.unlearner import unlearner_of

logger = logging.getLogger(__name__)


def check_options(
    model: nn.Module,
    loss: UnlearningLoss,
    collator: ForgetRetainCollator,
    reference: str,
    reference_dir: str | os.PathLike | None,
    alternate: bool,
    forget_fraction: float | None,
) -> None:
    """Check that the options of an `UnlearningTrainer` contradict neither each other nor the loss.

    Raises:
        ValueError: if they do.
    """
    if alternate and forget_fraction is not None:
        raise ValueError(
            f"alternate=True takes retain and forget rows in turn, but forget_fraction={forget_fraction!r} mixes "
            "them; leave one out."
        )
    if reference not in ("cached", "live") or (reference == "live" and reference_dir is not None):
        raise ValueError(
            f"reference={reference!r}, reference_dir={reference_dir!r}: expected 'cached', with or without a "
            "folder, or 'live' without one."
        )
    record = unlearner_of(model).spul_config
    if record is not None and record.prompt_position == "message" != collator.encoder.prompt_position:
        raise ValueError(
            'the prompt stands inside the rows (prompt_position="message"), and the collator does not say where; make '
            'it with the same: ForgetRetainCollator(..., prompt_position="message").'
        )
    name = type(loss.forget).__name__
    draws = collator.generic_completions is not None or collator.alternates is not None
    if loss.forget.needs_pairs != collator.pairs:
        raise ValueError(
            f"{name} {'compares' if loss.forget.needs_pairs else 'does not compare'} two responses of a forget row, "
            f"but the collator has pairs={collator.pairs}; use "
            f"ForgetRetainCollator(..., pairs={loss.forget.needs_pairs})."
        )
    if loss.forget.makes_unlikely and draws:
        raise ValueError(
            f"{name} makes the collated completion unlikely, which must be the row's own, but "
            "the collator has others; use ForgetRetainCollator(tokenizer, generic_completions=None, ...)."
        )
    if not loss.forget.makes_unlikely and not draws:
        logger.warning(
            "%s makes the completions of forget rows likely, and the collator uses the rows' own: correct only if "
            "these are generic already. Otherwise give the collator generic_completions.",
            name,
        )
    unlearner_of(model).reads(loss.reads_layer)  # raises where the loss reads what the model does not give
    if reference == "live" and loss.needs_reference and unlearner_of(model).trains_base:
        raise ValueError(
            f"reference='live' needs the model before training, but the weights of this {type(model).__name__} "
            "itself are trained; use reference='cached'."
        )


def check_training_rows(rows: Any, flags: Sequence[bool], loss: UnlearningLoss) -> None:
    """Check the `row_id`s of a training set, and warn where all of its rows are of one side.

    Args:
        rows: the training set.
        flags: its `is_forget`.
        loss: the objective. One that gives retain rows no weight is for forget rows alone.

    Raises:
        ValueError: if two rows share a `row_id`.
    """
    check_row_ids(rows)
    if not any(flags):
        logger.warning("none of the %d training rows has is_forget=True: nothing is forgotten.", len(flags))
    elif all(flags) and loss.uses_retain_rows:
        logger.warning(
            "all %d training rows have is_forget=True, and the loss weighs retain rows (alpha=%s, beta=%s): nothing "
            "is retained. Join both sets with forget_retain_dataset(forget, retain).",
            len(flags),
            loss.alpha,
            loss.beta,
        )


def checked_loss(model: Any, loss: UnlearningLoss | None) -> UnlearningLoss:
    """The training loss: the unlearner's own or `loss`.

    Raises:
        TypeError: if the model cannot be trained by `UnlearningTrainer`.
        ValueError: if there is no loss or two, or unlearning layers are detached.
    """
    unlearner = unlearner_of(model)
    unlearner.check_trainable()
    if unlearner.loss is not None:
        if loss is not None and loss != unlearner.loss:
            raise ValueError(
                f"loss={loss!r}, but the unlearner has {unlearner.loss!r}; pass the loss to the unlearner only."
            )
        return unlearner.loss
    if not isinstance(loss, UnlearningLoss):
        raise ValueError(
            f"loss={loss!r}: a {type(model).__name__} has no loss of its own; pass loss=UnlearningLoss(...), or wrap "
            "the model: SoftPromptUnlearner(model, PromptTuningConfig(...))."
        )
    return loss
