"""Checks of UnlearningTrainer before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.checks import check_row_ids
from ..data.collator import ForgetRetainCollator
from ..data.row_checks import RESIZE
from ..data.rows import SHOWN, listed
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import num_embeddings
from ..models.unlearner import Unlearner, unlearner_of

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


def check_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Check that the model embeds the pad token; warn of further tokens of the tokenizer that it does not.

    Raises:
        ValueError: if it does not embed the pad token.
    """
    if (num := num_embeddings(model)) is None:
        return
    remedy = f"Take the base's own tokenizer, or {RESIZE}."
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num:
        raise ValueError(
            f"the pad token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the model embeds {num} "
            f"tokens; expected a pad token that it embeds, or none. {remedy}"
        )
    if len(tokenizer) > num:
        missing = sorted(token for token, number in tokenizer.get_vocab().items() if number >= num)
        logger.warning(
            "the tokenizer has tokens that the model, which embeds %d, does not: %s. A row with one fails. %s",
            num,
            listed(list(map(repr, missing)), SHOWN),
            remedy,
        )


def trained_parameters(unlearner: Unlearner) -> list[nn.Parameter]:
    """The parameters that train now."""
    return [parameter for parameter in unlearner.called_model.parameters() if parameter.requires_grad]


def check_trains(unlearner: Unlearner, optimizer: Any, before: Sequence[nn.Parameter]) -> None:
    """Check that a step of the optimizer changes what is trained, where that is a prompt or another adapter.

    An optimizer that holds no parameter of the model is not judged: DeepSpeed's, and those that step on the CPU, train
    copies.

    Args:
        unlearner: of the model that trains.
        optimizer: its optimizer.
        before: what trained at the first step of this optimizer.

    Raises:
        ValueError: if it is disabled, or the optimizer has others of the model's parameters, as after `set_adapter`
            while it trains.
    """
    if not unlearner.enabled:
        raise ValueError(
            f"{unlearner.in_words} is disabled, so that nothing would be trained; call train outside "
            "disable_adapter()."
        )
    if unlearner.trains_base:
        return
    trained = set(map(id, trained_parameters(unlearner)))
    own = set(map(id, unlearner.called_model.parameters()))
    held = own.intersection(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    if trained.isdisjoint(map(id, before)) or (held and trained.isdisjoint(held)):
        raise ValueError(
            f"the optimizer has no parameter that trains, so that {unlearner.in_words} would stay as it is: "
            "set_adapter or delete_adapter was called since training began, or the optimizer was made of other "
            "parameters. Choose the adapter before train(), and make optimizers of those of its parameters that "
            "require gradients."
        )


def check_not_replaced(trainer: Any, given: Mapping[str, Any]) -> None:
    """Check that a trainer still has what it checked, counted and ordered when it was made.

    Args:
        trainer: the trainer.
        given: its attributes then, by name.

    Raises:
        ValueError: if one is another object now.
    """
    for name, value in given.items():
        if getattr(trainer, name) is not value:
            raise ValueError(
                f"trainer.{name} was replaced since the trainer was made, whose checks, order of rows, reference and "
                f"record are of the one given to it; make another UnlearningTrainer with the new {name}."
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
