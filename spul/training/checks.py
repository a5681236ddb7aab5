"""Checks of UnlearningTrainer before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..data.checks import check_row_ids, check_rows
from ..data.collator import ForgetRetainCollator
from ..data.encoder import RowEncoder
from ..data.row_checks import RESIZE, check_can_be_scored
from ..data.rows import SHOWN
from ..data.samplers import EpochSampler
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import num_embeddings
from ..models.protocol import Unlearner
from ..models.unlearner import unlearner_of
from ..records.digests import digest_of_tokenizer
from ..records.messages import listed
from .options import is_stream

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
    """Check that a training set has rows, each with a `row_id` of its own, and warn where all are of one side.

    Args:
        rows: the training set.
        flags: its `is_forget`.
        loss: the objective. One that gives retain rows no weight is for forget rows alone.

    Raises:
        ValueError: if there are no rows, or two share a `row_id`.
    """
    if not len(rows):
        raise ValueError(no_rows_in_words(rows))
    check_row_ids(rows)
    num_forget = sum(flags)
    warn_of_one_side(num_forget, len(flags) - num_forget, loss)


def warn_of_one_side(num_forget: int, num_retain: int, loss: UnlearningLoss) -> None:
    """Warn where all rows to train on, so many of each side, are of one side that the loss cannot do with alone."""
    if not num_forget:
        logger.warning("none of the %d training rows has is_forget=True: nothing is forgotten.", num_retain)
    elif not num_retain and loss.uses_retain_rows:
        logger.warning(
            "all %d training rows have is_forget=True, and the loss weighs retain rows (alpha=%s, beta=%s): nothing "
            "is retained. Join both sets with forget_retain_dataset(forget, retain).",
            num_forget,
            loss.alpha,
            loss.beta,
        )


def check_evaluation_rows(rows: Any, encoder: RowEncoder, num_embedded: int | None) -> None:
    """Check the rows that are evaluated within a training, before hours of it.

    Args:
        rows: `eval_dataset` of `UnlearningTrainer`.
        encoder: of the rows.
        num_embedded: number of tokens that the base has an embedding for; None if unknown.

    Raises:
        TypeError: if a set is no data set.
        ValueError: if it has no rows or lacks a column, or a row cannot be scored.
    """
    for name, some in (rows if isinstance(rows, Mapping) else {"eval_dataset": rows}).items():
        check_rows(some, name=name)
        check_can_be_scored(encoder, name, some, num_embedded)


def no_rows_in_words(rows: Any) -> str:
    """The message for training rows of which there are none."""
    if is_stream(rows):
        return (
            f"train_dataset, a stream ({type(rows).__name__}), gave no rows in a pass over it; expected at least one "
            "batch in every pass. Check its files and filters. A stream that can be read only once must open its "
            "source anew in __iter__, or have rows for all of max_steps."
        )
    return "train_dataset has no rows; expected those of forget_retain_dataset(forget, retain)."


def check_takes_steps(args: TrainingArguments, rows: Any, sampler: EpochSampler | None, num_processes: int) -> None:
    """Check that a training takes steps with gradients; `Trainer` would end one without steps in silence.

    Args:
        args: the training arguments.
        rows: the training rows; None without any.
        sampler: of the training; None draws each row once an epoch.
        num_processes: that divide an epoch's rows.

    Raises:
        ValueError: if it does not.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are turned off where train is called, by torch.no_grad(), torch.inference_mode() or "
            "torch.set_grad_enabled(False), so that nothing would be trained; turn them on for it."
        )
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps={args.max_steps} with num_train_epochs={args.num_train_epochs:g} trains nothing; expected a "
            "number of steps from 1, or max_steps=-1 and a number of epochs above 0."
        )
    if rows is None or is_stream(rows) or not args.dataloader_drop_last:
        return
    drawn: Any = rows if sampler is None else sampler
    num_draws = len(drawn)
    config: Any = args.accelerator_config
    needed = args.per_device_train_batch_size * (1 if config.split_batches else num_processes)
    if num_draws < needed:
        raise ValueError(
            f"dataloader_drop_last=True drops every batch: an epoch has {num_draws} rows, and the processes' batches "
            f"need {needed}, so that nothing would be trained. Leave it out, or lower per_device_train_batch_size="
            f"{args.per_device_train_batch_size}."
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


def check_processing_class(processing_class: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer which is saved with checkpoints is the one that makes the rows' tokens.

    Args:
        processing_class: of `UnlearningTrainer`; None, a tokenizer, or a processor that has one.
        tokenizer: of the collator.

    Raises:
        ValueError: if it is not.
    """
    is_tokenizer = isinstance(processing_class, PreTrainedTokenizerBase)
    given = processing_class if is_tokenizer else getattr(processing_class, "tokenizer", processing_class)
    if given is None or given is tokenizer:
        return
    is_alike = isinstance(given, PreTrainedTokenizerBase) and digest_of_tokenizer(given) == digest_of_tokenizer(
        tokenizer
    )
    if not is_alike:
        raise ValueError(
            f"processing_class, a {type(processing_class).__name__}, has another vocabulary, special tokens or chat "
            f"template than the collator's tokenizer, a {type(tokenizer).__name__}: another one would be saved than "
            "was trained with. Pass processing_class=collator.tokenizer, or make the collator with this one."
        )


def trained_parameters(unlearner: Unlearner) -> list[nn.Parameter]:
    """The parameters that train now."""
    return [parameter for parameter in unlearner.called_model.parameters() if parameter.requires_grad]


def check_base_is_frozen(unlearner: Unlearner) -> None:
    """Check that no weight trains that is left out of what is saved.

    Raises:
        ValueError: if the base under a prompt, layers or LoRA has some that require gradients.
    """
    if names := unlearner.unsaved_parameters():
        raise ValueError(
            f"{len(names)} parameter(s) of the base require gradients, the first is {names[0]!r}: they would train, "
            f"and be missing in what is saved of {unlearner.in_words}; expected a frozen base. Call "
            "requires_grad_(False) on them, or train the whole model, or name modules in LoRA's modules_to_save."
        )


def check_trains(unlearner: Unlearner, optimizer: Any, before: Sequence[nn.Parameter]) -> None:
    """Check that a step of the optimizer changes what is trained, where that is a prompt or another adapter.

    An optimizer that holds no parameter of the model is not judged: DeepSpeed's, and those that step on the CPU, train
    copies.

    Args:
        unlearner: of the model that trains.
        optimizer: its optimizer.
        before: what trained at the first step of this optimizer.

    Raises:
        ValueError: if it is disabled or deleted, the base beneath it would train, or the optimizer has others of the
            model's parameters, as after `set_adapter` while it trains.
    """
    if not unlearner.enabled:
        raise ValueError(
            f"{unlearner.in_words} is disabled, or was deleted, so that nothing would be trained; call train outside "
            "disable_adapter(), and delete the prompt after training."
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
        TypeError: if the model cannot be trained by `UnlearningTrainer`, or its own loss is none.
        ValueError: if there is no loss or two, or unlearning layers are detached.
    """
    unlearner = unlearner_of(model)
    unlearner.check_trainable()
    if not isinstance(unlearner.loss, (UnlearningLoss, type(None))):
        raise TypeError(f"loss={unlearner.loss!r}: expected an UnlearningLoss, such as UnlearningLoss(forget=NPO()).")
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
