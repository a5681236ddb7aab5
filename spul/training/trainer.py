"""UnlearningTrainer: transformers' Trainer with an exact loss over forget and retain rows of a step."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..data.checks import check_is_forget, check_not_generic, forget_flags
from ..data.collator import ForgetRetainCollator
from ..data.rows import column_batches, completion_text, read_rows
from ..data.samplers import EpochSampler, RowCopies, epoch_sampler
from ..evaluation.metrics.scoring import Answers, collect_answers, summarize
from ..layers.unlearning_layers import UnlearningLayers
from ..losses.unlearning_loss import UnlearningLoss
from ..models.compat import gathered, keep_4bit_differentiable, save_training_args, speed_metrics
from ..models.unlearner import Unlearner, unlearner_of
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.digests import DataSummary, DigestKey, read_digest_key, summarize_rows
from ..records.spul_config import SpulConfig
from .checks import check_options, check_training_rows, checked_loss, last_complete_checkpoint
from .forward import unlearning_forward
from .reference import ReferenceCache

ROW_COLUMNS = (
    "prompt",
    "completion",
    "completion_mask",
    "input_ids",
    "num_ending",
    "generic_ids",
    "is_forget",
    "row_id",
    "copy",
)
TERMS = ("forget_loss", "retain_loss", "kl_loss", "lm_loss")


class UnlearningTrainer(Trainer):
    """Trains a `SoftPromptUnlearner`, `UnlearningLayers`, LoRA, or all weights of a causal LM.

    In addition to `transformers.Trainer`: the loss is normalized over the forget and the retain rows of the whole
    step, so that one batch of 32, 4 accumulated batches of 8 and 2 processes with 16 make the same step; every term
    is logged; a resumed run equals an uninterrupted one bit for bit; evaluation reports accuracy, weighted F1 and the
    share of generic answers of each split.

    Args:
        model: a `SoftPromptUnlearner`, `UnlearningLayers`, or a causal LM of transformers, bare or under a PEFT
            adapter such as LoRA; its parameters that require gradients are trained.
        args: `TrainingArguments`; its `label_smoothing_factor` must be 0.
        data_collator: a `ForgetRetainCollator`.
        train_dataset: the result of `forget_retain_dataset`, as it is or mapped with `collator.tokenize`.
        eval_dataset: rows with `prompt` and `completion`, or a dict of such (`train_retain`, `train_forget`, ...).
            Metrics are `eval_<name>_accuracy`, `_f1`, `_generic` and `_loss`, see `spul.evaluation.metrics.summarize`.
        processing_class: the tokenizer, saved with checkpoints.
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
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        TypeError: if model or collator are of another type.
        FileNotFoundError: if `digest_key` is the path of no file.
        ValueError: for options of `Trainer` that contradict this loss, rows without `is_forget`, rows that share a
            `row_id`, forget rows that `max_length` cuts a name from, labels that are generic completions too, or a
            `digest_key` that is none.
    """

    # The loss is already divided by the counts of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: SoftPromptUnlearner | UnlearningLayers | PeftModel | PreTrainedModel,
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
        loss = checked_loss(model, loss)
        key = None if digest_key is None else read_digest_key(digest_key)
        if not isinstance(data_collator, ForgetRetainCollator):
            raise TypeError(f"data_collator is a {type(data_collator).__name__}; expected a ForgetRetainCollator.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func would replace the unlearning loss; pass loss=UnlearningLoss(...) instead."
            )
        check_options(model, loss, args, data_collator, reference, reference_dir, alternate, forget_fraction)
        keep_4bit_differentiable(model)
        self._reference_mode, self._reference_dir = reference, reference_dir
        self._reference: ReferenceCache | None = None
        self._flags: list[bool] = []
        self._sampler: EpochSampler | None = None
        if train_dataset is not None:
            self._flags = forget_flags(train_dataset)
            self._check_rows(train_dataset, loss)
            data_collator.warn_of_cut_rows(train_dataset)
            settings = TrainingArguments() if args is None else args
            self._sampler = epoch_sampler(
                train_dataset,
                self._flags,
                data_collator.encoder,
                forget_fraction=forget_fraction,
                alternate=alternate,
                strategy=settings.train_sampling_strategy,
                batch_size=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
                seed=settings.seed if settings.data_seed is None else settings.data_seed,
                length_column=settings.length_column_name,
                progress=not settings.disable_tqdm,
            )
        rows = train_dataset
        if self._sampler is not None and self._sampler.draws_copies:
            train_dataset = RowCopies(train_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (DataParallel) are not supported: start one process per GPU with "
                "`accelerate launch`, or show one GPU only with CUDA_VISIBLE_DEVICES=0."
            )
        self._learner, self._collator, self._loss = model, data_collator, loss
        self._terms = TERMS if loss.gamma > 0 else TERMS[:-1]
        self._unlearner = unlearner_of(model)
        if not self._unlearner.can_be_sharded and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("unlearning layers cannot be trained under FSDP or DeepSpeed; use DDP or one GPU.")
        if rows is not None and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "no parameter requires a gradient: the prompt was loaded for inference, or the model is frozen. Load "
                "a prompt with SoftPromptUnlearner.from_pretrained(..., is_trainable=True)."
            )
        if rows is not None:  # not before every check has passed: the record of a refused model stays
            record = self._unlearner.spul_config
            self._describe_data(record, data_collator, rows, self._flags, key)
            if record is not None and self._unlearner.loss is None:  # a prompt records its own when it is saved
                record.loss = loss.to_dict()
        self.add_callback(_Epochs(self._unlearner, data_collator, self._sampler))
        self._term_sums = torch.zeros(len(self._terms), device=self.args.device)
        self._term_values = self._term_sums  # of the last batch
        self.args.logging_nan_inf_filter = False  # it would log an old mean in place of NaN; `training_step` raises
        self._terms_since = self.state.global_step

    # ---- data ----

    def _check_rows(self, rows: Any, loss: UnlearningLoss) -> None:
        """Refuse rows that cannot be told apart, and warn of sets that cannot do what the loss is for."""
        check_training_rows(rows, self._flags, loss)

    @staticmethod
    def _describe_data(
        record: SpulConfig | None, collator: ForgetRetainCollator, rows: Any, flags: list[bool], key: bytes | None
    ) -> None:
        """Refuse labels that are generic completions; record number and keyed digest of the training rows."""
        if "completion" in getattr(rows, "column_names", ()):
            completions = itertools.chain.from_iterable(column_batches(rows, "completion"))
            check_not_generic(map(completion_text, completions), collator.generic_completions)
        if record is None:
            return
        record.generic_completions = collator.generic_completions
        for name, group in (("forget", True), ("retain", False)):
            if key is None:
                setattr(record, name, DataSummary(flags.count(group)))
                continue
            content = read_rows(rows, ("prompt", "completion", "input_ids", "completion_mask"))
            picked = itertools.compress(content, (flag == group for flag in flags))
            setattr(record, name, summarize_rows(picked, key))

    def _set_signature_columns_if_needed(self) -> None:
        # The collator needs the rows' own columns, whatever the base's forward takes.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            text_field = self._collator.encoder.text_field
            own = [*ROW_COLUMNS, *([text_field] if text_field else [])]
            self._signature_columns: Any = [*(self._signature_columns or []), *own]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    # ---- training ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Read the batches of a step, and add the numbers of forget and retain rows of the whole step to each."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            check_is_forget(batch, "a batch")
        if not batches:
            return batches, num_items
        flags = torch.cat([batch["is_forget"] for batch in batches]).to(device)
        counts = torch.stack([flags.sum(), (~flags).sum()]).float()
        # DDP averages gradients over processes, so the counts are averages too.
        counts = self.accelerator.reduce(counts, reduction="mean") if self.accelerator.num_processes > 1 else counts
        for batch in batches:
            batch["group_counts"] = counts
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The unlearning loss of one batch, as its share of the whole step."""
        check_is_forget(inputs, "a batch")
        if self._reference is not None and model.training:
            with self.accelerator.autocast():
                inputs = {**inputs, "reference_logits": self._reference.logits(inputs)}
        if self._unlearner.computes_loss:
            outputs = model(**inputs)
        else:
            with self.accelerator.autocast():  # also around the base model, which accelerate does not wrap
                outputs = unlearning_forward(model, self._loss, **inputs)
        if model.training:
            self._term_values = torch.stack([outputs[term].detach().to(self._term_sums) for term in self._terms])
            self._term_sums += self._term_values
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch, as in `Trainer`.

        The terms are checked after the backward pass. This waits for the device, as Trainer's NaN filter
        (off here) would.

        Raises:
            FloatingPointError: if a term of the loss is NaN or infinite; the optimizer has not stepped.
        """
        loss = super().training_step(*args, **kwargs)
        if not self._term_values.isfinite().all():
            values = zip(self._terms, self._term_values.tolist(), strict=True)
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: {', '.join(f'{name}={value:g}' for name, value in values)}; "
                "expected finite values. Training has diverged, or began with weights that are not finite: resume "
                "from an earlier checkpoint with a lower learning rate, or with bf16 or float32 in place of fp16."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss and its terms, averaged over the steps since the last log."""
        steps = self.state.global_step - self._terms_since
        if "loss" in logs and steps > 0:
            sums = self._term_sums / steps
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, reduction="mean")
            logs.update(zip(self._terms, sums.tolist(), strict=True))
            self._term_sums.zero_()
            self._terms_since = self.state.global_step
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` resumes from the last complete checkpoint.

        Raises:
            ValueError: if no checkpoint is complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir or ".")
        self._term_sums.zero_()
        self._terms_since = 0
        if resume_from_checkpoint:
            state = json.loads(Path(resume_from_checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
            self._terms_since = state["global_step"]
        self._open_reference()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _open_reference(self) -> None:
        """Compute the reference of the training rows, or open the stored one."""
        if self._reference is not None and self._unlearner.trains_base:
            return  # of the model before the first train(); it has other weights now
        self._reference = None
        asks = self._loss.rows_needing_reference(torch.tensor(self._flags, dtype=torch.bool))
        if self._reference_mode == "cached" and asks.any():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "reference='cached' reads the whole base in every process, but FSDP and DeepSpeed shard it. Use "
                    "reference='live' for a prompt or LoRA; the full model needs a loss without a reference."
                )
            if (self.args.fp16_full_eval or self.args.bf16_full_eval) and not self.is_model_parallel:
                self._move_model_to_device(self._learner, self.args.device)  # as Trainer does, later
            rows: Any = self.train_dataset
            with self.accelerator.autocast():
                self._reference = ReferenceCache.build(
                    self._learner,
                    rows.rows if isinstance(rows, RowCopies) else rows,
                    self._collator,
                    self._reference_dir,
                    self.args.eval_batch_size,
                    self.accelerator,
                    progress=not self.args.disable_tqdm,
                    loss=self._loss,
                )

    # ---- checkpoints: Trainer saves and loads PEFT's adapters, but not unlearning layers ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self._unlearner.has_own_checkpoint:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir or "."
            self._learner.save_pretrained(folder)
            (self.processing_class or self._collator.tokenizer).save_pretrained(folder)
            save_training_args(self.args, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._unlearner.has_own_checkpoint:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._unlearner.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._unlearner.has_own_checkpoint:
            super()._load_best_model()
        else:
            self._unlearner.load_checkpoint(self.state.best_model_checkpoint or ".")

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score every evaluation set by greedy decoding at the response positions.

        Args:
            eval_dataset: rows with `prompt` and `completion`, a dict of such, or the name of one of the trainer's
                sets; None takes the trainer's.
            ignore_keys: not used.
            metric_key_prefix: first part of the metrics' names.

        Returns:
            `<prefix>_<name>_accuracy`, `_f1`, `_generic`, `_loss` for every set of a dict, without `<name>` for a
            single set.

        Raises:
            ValueError: if there are no rows.
        """
        own: Any = self.eval_dataset
        rows = own if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = {rows: own[rows]}
        if rows is None:
            raise ValueError("evaluate needs rows: pass eval_dataset here or to UnlearningTrainer.")
        if not isinstance(rows, dict):
            metrics = self._score(rows, metric_key_prefix)
        else:
            metrics = {}
            for name, split in rows.items():
                metrics.update(self._score(split, f"{metric_key_prefix}_{name}"))
                measured = {key: metrics[f"{metric_key_prefix}_{name}_{key}"] for key in ("accuracy", "f1", "generic")}
                record = self._unlearner.spul_config
                if record is not None and self._unlearner.enabled:
                    record.metrics[name] = measured
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(self, rows: Any, prefix: str) -> dict[str, float]:
        start, rank, world = time.time(), self.accelerator.process_index, self.accelerator.num_processes
        progress = None if self.args.disable_tqdm or rank else prefix
        with self.accelerator.autocast():
            # The plain model, not DDP's: every process has rows of its own, and their numbers may differ.
            some = range(rank, len(rows), world)
            found = collect_answers(self._learner, rows, self._collator, self.args.eval_batch_size, some, progress)
        answers = Answers()
        for part in gathered([found]):
            answers.true += part.true
            answers.predicted += part.predicted
            answers.nll += part.nll
        metrics = summarize(answers, self._collator.generic_completions)
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return {**metrics, **speed_metrics(prefix, start, num_samples=len(rows))}


class _Epochs(TrainerCallback):
    """Sets the epoch of collator and sampler, so that draws resume, and drops metrics of an earlier prompt."""

    def __init__(
        self,
        unlearner: Unlearner,
        collator: ForgetRetainCollator,
        sampler: EpochSampler | None,
    ) -> None:
        self.unlearner, self.collator, self.sampler = unlearner, collator, sampler

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.unlearner.parameters_changed()  # evaluation, which records metrics, comes after this

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        self.collator.set_epoch(epoch)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
