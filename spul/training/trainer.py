"""UnlearningTrainer: transformers' Trainer with an exact loss over forget and retain rows of a step."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainingArguments, enable_full_determinism, set_seed

from ..data.checks import check_not_generic
from ..data.collator import ROW_COLUMNS, ForgetRetainCollator, checked_collator
from ..data.row_checks import check_can_be_scored
from ..data.rows import column_batches, completion_text
from ..data.samplers import EpochSampler, RowCopies, epoch_sampler
from ..layers.unlearning_layers import UnlearningLayers
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import num_embeddings
from ..models.compat import keep_4bit_differentiable
from ..models.unlearner import unlearner_of
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.digests import DigestKey, fingerprint, is_transformed, plain_rows, read_digest_key
from .best_metric import check_best_metric
from .callbacks import EmbeddingNoise, EpochCallback, MultiplierCallback
from .checks import (
    check_base_is_frozen,
    check_evaluation_rows,
    check_not_replaced,
    check_options,
    check_processing_class,
    check_takes_steps,
    check_tokens,
    check_training_rows,
    checked_loss,
)
from .options import check_dispatch, check_training_order, is_stream, refuse_options
from .reference import ReferenceCache
from .resuming import check_resumes, identity_of, last_complete_checkpoint, saved_batch_size
from .saving import SavingTrainer
from .training_rows import TrainingRows

logger = logging.getLogger(__name__)


class UnlearningTrainer(SavingTrainer):
    """Trains a `SoftPromptUnlearner`, `UnlearningLayers`, LoRA, or all weights of a causal LM.

    In addition to `transformers.Trainer`: the loss is normalized over the forget and the retain rows of the whole
    step, so that one batch of 32, 4 accumulated batches of 8 and 2 processes with 16 make the same step; every term
    is logged; a resumed run equals an uninterrupted one bit for bit; evaluation reports accuracy, weighted F1 and the
    share of generic answers of each split.

    Args:
        model: a `SoftPromptUnlearner`, `UnlearningLayers`, or a causal LM of transformers, bare or under a PEFT
            adapter such as LoRA; its parameters that require gradients are trained. None if `model_init` makes it.
        args: `TrainingArguments`; `spul.training.options` lists what is honored and what is refused.
        data_collator: a `ForgetRetainCollator`.
        train_dataset: the result of `forget_retain_dataset`, as it is or mapped with `collator.tokenize`; or a stream
            of such rows (`IterableDataset`), where no cached reference is needed.
        eval_dataset: rows with `prompt` and `completion`, or a dict of such (`train_retain`, `train_forget`, ...).
            Metrics are `eval_<name>_accuracy`, `_f1`, `_generic` and `_loss`, see `spul.evaluation.metrics.summarize`.
        processing_class: the tokenizer, saved with checkpoints; the collator's, or one that agrees with it.
        forget_fraction: share of forget rows in every batch, above 0 and below 1. None (default) shuffles all rows
            together, as the SPUL paper does.
        alternate: True alternates between passes over the retain rows and over the forget rows, as published for EUL;
            the batch between two passes holds both. False (default) mixes them.
        reference: source of the reference logits, the base model's, which the KL term compares with. `"cached"`
            (default) computes them once before training and stores them on disk, see `ReferenceCache.build`; `"live"`
            computes them in every step, by a forward pass over the retain rows, which is not possible if the base's
            own weights are trained.
        reference_dir: folder of the cached reference; None has one for each base and data set beside the Hugging Face
            cache, shared by later runs.
        loss: the objective; None for a `SoftPromptUnlearner`, which has its own.
        digest_key: the owner's secret, bytes or the path of a file of `spul.records.make_digest_key`: the record and
            the card get a digest of the forget and of the retain rows, by which its owner proves later which they
            were (`spul.records.is_summary_of`). None (default) records the counts alone. The key is not saved.
        kwargs: further arguments of `transformers.Trainer`, such as `compute_metrics` and `model_init`.

    Raises:
        TypeError: if model, collator or evaluation rows are of another type.
        FileNotFoundError: if `digest_key` is the path of no file.
        ValueError: for options of `Trainer` that contradict this loss, rows without `is_forget`, rows that share a
            `row_id`, forget rows that `max_length` cuts a name from, labels that are generic completions too, another
            model's tokenizer, a `processing_class` unlike the collator's, or a `digest_key` that is none.
    """

    def __init__(
        self,
        model: SoftPromptUnlearner | UnlearningLayers | PeftModel | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: ForgetRetainCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        forget_fraction: float | None = None,
        alternate: bool = False,
        reference: Literal["cached", "live"] = "cached",
        reference_dir: str | os.PathLike | None = None,
        loss: UnlearningLoss | None = None,
        digest_key: DigestKey | None = None,
        **kwargs: Any,
    ) -> None:
        key = None if digest_key is None else read_digest_key(digest_key)
        data_collator = checked_collator(data_collator, "data_collator")
        args = TrainingArguments("tmp_trainer") if args is None else args  # the folder that Trainer takes
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}; expected TrainingArguments(output_dir, ...).")
        refuse_options(args, {**kwargs, "eval_dataset": eval_dataset})
        check_processing_class(processing_class, data_collator.tokenizer)
        train_dataset = plain_rows(train_dataset)
        self._collator, self._given_loss, self._rows = data_collator, loss, train_dataset
        self._noise = EmbeddingNoise()
        self._reference_mode, self._reference_dir = reference, reference_dir
        self._forget_fraction, self._alternate = forget_fraction, alternate
        self._made: Any = None
        self.args = args
        if model is None and kwargs.get("model_init") is not None:  # made once, for the checks and for Trainer
            self.model_init = kwargs["model_init"]
            enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            self._made = super().call_model_init()
        self._take(self._made if model is None else model)
        self.sampler: EpochSampler | None = None
        if train_dataset is not None:
            check_training_order(train_dataset, args, reference, self._loss, forget_fraction, alternate)
        self._facts = TrainingRows(train_dataset, data_collator, key)
        if train_dataset is not None and not is_stream(train_dataset):
            self._check_rows()
            num_embedded = num_embeddings(self._learner)
            check_can_be_scored(data_collator.encoder, "train_dataset", train_dataset, num_embedded)
            data_collator.warn_of_cut_rows(train_dataset)
            if "completion" in getattr(train_dataset, "column_names", ()):
                completions = itertools.chain.from_iterable(column_batches(train_dataset, "completion"))
                check_not_generic(map(completion_text, completions), data_collator.generic_completions)
            self.sampler = self._new_sampler()
            if self.sampler is not None and self.sampler.draws_copies:
                train_dataset = RowCopies(train_dataset)
        if eval_dataset is not None:
            check_evaluation_rows(eval_dataset, data_collator.encoder, num_embeddings(self._learner))
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (DataParallel) are not supported: start one process per GPU with "
                "`accelerate launch`, or show one GPU only with CUDA_VISIBLE_DEVICES=0."
            )
        check_dispatch(self._rows, self.args.accelerator_config, self.accelerator.num_processes, data_collator.pairs)
        if not self.unlearner.can_be_sharded and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("unlearning layers cannot be trained under FSDP or DeepSpeed; use DDP or one GPU.")
        self.shard_base()
        self._given_data = {"train_dataset": self.train_dataset, "data_collator": self.data_collator}
        self._record_data()  # not before every check has passed: the record of a refused model stays
        self.add_callback(EpochCallback(self, data_collator))
        self.add_callback(MultiplierCallback(self))
        self.args.logging_nan_inf_filter = False  # it would log an old mean in place of NaN; `training_step` raises
        self.neftune_noise_alpha = None  # Trainer's noise, see `EmbeddingNoise`
        self.restart_terms()

    # ---- model ----

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model of `model_init`, as `Trainer` asks for it before each training, checked as a given one is."""
        if self._made is not None:
            made, self._made = self._made, None
            return made
        model = super().call_model_init(trial)
        self._take(model)
        self._record_data()
        return model

    def _take(self, model: Any) -> None:
        """Check a model and its loss, and train it from now on."""
        loss = checked_loss(model, self._given_loss)
        check_options(
            model,
            loss,
            self._collator,
            self._reference_mode,
            self._reference_dir,
            self._alternate,
            self._forget_fraction,
        )
        if self._rows is not None and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "no parameter requires a gradient: the prompt was loaded for inference, the last one was deleted, or "
                "the model is frozen. Load a prompt with SoftPromptUnlearner.from_pretrained(..., is_trainable=True), "
                "or add one with add_adapter."
            )
        if self._rows is not None:
            check_base_is_frozen(unlearner_of(model))
        check_tokens(model, self._collator.tokenizer)
        keep_4bit_differentiable(model)
        self._learner, self._loss, self.unlearner = model, loss, unlearner_of(model)
        self._take_multiplier()
        self._reference: ReferenceCache | None = None
        self._built_from: str | None = None  # fingerprint of that model, if its own weights train

    def _hp_search_setup(self, trial: Any) -> None:
        # Trainer calls it before each training, when the model is there and on its device.
        super()._hp_search_setup(trial)
        if trial is not None and self.sampler is not None:
            self.sampler = self._new_sampler()
        self._open_reference()
        self._noise.start(self.unlearner.get_base_model(), self.args.neftune_noise_alpha)

    # ---- data ----

    def _check_rows(self) -> None:
        """Refuse rows that cannot be told apart, and warn of sets that cannot do what the loss is for."""
        check_training_rows(self._rows, self._facts.flags, self._loss)

    def _record_data(self) -> None:
        """Write the generic completions, numbers and digest of the training rows, and the loss into the record."""
        record = self.unlearner.spul_config
        if record is None or self._rows is None:
            return
        record.generic_completions = self._collator.generic_completions
        record.forget, record.retain = copy.deepcopy(self._facts.summaries)
        record.rewritten = copy.deepcopy(self._facts.rewritten)
        if self.unlearner.loss is None:  # a prompt records its own when it is saved
            record.loss = self._loss.to_dict()

    def _new_sampler(self) -> EpochSampler | None:
        """The sampler of the arguments as they are now: a search changes them."""
        return epoch_sampler(
            self._rows,
            self._facts.flags,
            self._collator.encoder,
            forget_fraction=self._forget_fraction,
            alternate=self._alternate,
            strategy=self.args.train_sampling_strategy,
            batch_size=self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            length_column=self.args.length_column_name,
            progress=not self.args.disable_tqdm,
        )

    def _set_signature_columns_if_needed(self) -> None:
        # The collator needs the rows' own columns, whatever the base's forward takes.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            more = (self._collator.encoder.text_field, self._collator.alternates)
            own = [*ROW_COLUMNS, *(name for name in more if name)]
            self._signature_columns: Any = [*(self._signature_columns or []), *own]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        # A transform of the caller's may read every column.
        return dataset if is_transformed(dataset) else super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.sampler is None:
            return super()._get_train_sampler(train_dataset)
        config: Any = self.args.accelerator_config
        num_processes = 1 if config.split_batches else self.accelerator.num_processes
        # Of all processes' rows of a step, so that any number of them has the same order; the size maybe found.
        self.sampler.batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * num_processes
        return self.sampler

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` resumes from the last complete checkpoint.

        Raises:
            ValueError: if no checkpoint is complete, or it is of a training with other rows or another loss; if rows
                or collator were replaced since the trainer was made; if no step would be taken, or gradients are off;
                if no evaluation set has `metric_for_best_model`.
        """
        check_not_replaced(self, self._given_data)
        check_takes_steps(self.args, self._rows, self.sampler, self.accelerator.num_processes)
        check_best_metric(self)
        if self.unlearner.loss is not None and self.unlearner.loss is not self._loss:  # replaced since
            self._take(self._learner)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir or ".")
        if resume_from_checkpoint and self._rows is not None:  # before a reference is computed for hours
            finds = self.args.auto_find_batch_size  # and goes on with the size that was found
            identity = self.identity(saved_batch_size(resume_from_checkpoint) if finds else None)
            check_resumes(resume_from_checkpoint, identity, finds)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._noise.stop()
        self._evaluated_weights()
        return output

    def identity(self, batch_size: int | None = None) -> dict[str, Any]:
        """All that the rows of every step and their loss depend on, by which a training resumes or is refused.

        Args:
            batch_size: of each process; None takes the one that it trains with.
        """
        rows_of_a_batch = (batch_size or self._train_batch_size) * self.accelerator.num_processes
        is_compared = self._loss.needs_reference or not self.unlearner.trains_base
        return identity_of(
            self._facts.identity,
            (self._built_from or fingerprint(self.unlearner.get_base_model())) if is_compared else None,
            self._loss,
            self.multiplier,
            self._collator,
            self.args,
            rows_of_a_batch * self.args.gradient_accumulation_steps,
            self._facts.lengths(self.args),
            self._forget_fraction,
            self._alternate,
        )

    def _open_reference(self) -> None:
        """Compute the reference of the training rows, or open the stored one."""
        if self._reference is not None and self.unlearner.trains_base:
            return  # of the model before the first train(); it has other weights now
        self._reference = None
        if self.unlearner.trains_base and self._loss.needs_reference:
            self._built_from = fingerprint(self.unlearner.get_base_model())
        asks = self._loss.rows_needing_reference(torch.tensor(self._facts.flags, dtype=torch.bool))
        is_lora = not (self.unlearner.trains_base or self.unlearner.computes_loss)
        if self.is_deepspeed_enabled and is_lora and asks.any():
            # PEFT disables LoRA by disabling its gradients, of which the engine then misses some, and waits for ever.
            raise ValueError(
                "under DeepSpeed's stages 1 and 2 LoRA needs a loss without a reference, such as "
                "UnlearningLoss(beta=0.0): leave deepspeed out, for DDP, or use stage 3, which shards the base."
            )
        if self._reference_mode == "cached" and asks.any():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "reference='cached' is not computed where FSDP or DeepSpeed shard weights that train: the full "
                    "model needs a loss without a reference. Under DeepSpeed use reference='live' for a prompt."
                )
            if (self.args.fp16_full_eval or self.args.bf16_full_eval) and not self.is_model_parallel:
                self._move_model_to_device(self._learner, self.args.device)  # as Trainer does, later
            with self.accelerator.autocast():
                self._reference = ReferenceCache.build(
                    self._learner,
                    self._rows,
                    self._collator,
                    self._reference_dir,
                    self.args.eval_batch_size,
                    self.accelerator,
                    progress=not self.args.disable_tqdm,
                    loss=self._loss,
                )

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search over hyperparameters, as in `Trainer`, by models of `model_init`.

        Args:
            hp_space: of a trial, values of `TrainingArguments`; `model_init(trial)` may ask for others, such as alpha.
            compute_objective: a number of the metrics of `evaluate`, such as `lambda m: m["eval_forget_accuracy"] -
                m["eval_retain_accuracy"]`. None adds up all metrics, as `Trainer` does, good and bad: a warning.
            args: as in `Trainer`, such as `n_trials`; `kwargs` too, such as `direction` and `backend`.
        """
        if compute_objective is None:
            logger.warning(
                "hyperparameter_search adds up all metrics, although forgetting lowers some and retaining raises "
                "others; pass compute_objective, a function of the metrics of evaluate."
            )
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)
