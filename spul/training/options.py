"""Options of `TrainingArguments` and `Trainer`: those that `UnlearningTrainer` honors, and those it refuses and why.

Every option of the supported transformers versions stands in one of three tables; some versions lack some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..data.checks import check_is_forget, whole_number
from ..losses.unlearning_loss import UnlearningLoss
from ..records.fields import is_finite_number

AS_IN_TRAINER = {
    "optimizer": "adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type "
    "max_grad_norm optim optim_args optimizer_cls_and_kwargs optimizers warmup_steps "
    "weight_decay",
    "steps": "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
    "seed data_seed full_determinism",
    "computation": "bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps "
    "use_cpu use_cache activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
    "gradient_checkpointing_kwargs",
    "data": "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
    "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ignore_data_skip",
    "processes": "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph "
    "ddp_timeout local_rank",
    "evaluation": "do_eval do_predict do_train eval_delay eval_on_start eval_steps eval_strategy "
    "per_device_eval_batch_size batch_eval_metrics eval_do_concat_batches preprocess_logits_for_metrics "
    "greater_is_better load_best_model_at_end metric_for_best_model",
    "logs": "callbacks debug disable_tqdm include_num_input_tokens_seen log_level log_level_replica log_on_each_node "
    "logging_first_step logging_steps logging_strategy project report_to run_name skip_memory_metrics "
    "trackio_bucket_id trackio_space_id trackio_static_space_id",
    "checkpoints": "args enable_jit_checkpoint output_dir processing_class restore_callback_states_from_checkpoint "
    "save_on_each_node save_only_model save_steps save_strategy save_total_limit",
    "Hub": "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token push_to_hub",
}
"""Honored as in `Trainer`, by what they are about."""

HONORED = {
    "accelerator_config": "dispatch_batches on several processes needs split_batches",
    "auto_find_batch_size": "also in the sampler; terms of an aborted try are not logged",
    "average_tokens_across_devices": "no effect: the loss is divided by rows, averaged over processes",
    "compute_metrics": "called with logits and labels at the response positions, which need no shift",
    "data_collator": "a ForgetRetainCollator",
    "deepspeed": "stage 3 shards the base under a prompt or LoRA; 1 and 2 with reference='live' alone, LoRA without",
    "eval_accumulation_steps": "no effect: predictions leave the device after every batch",
    "eval_dataset": "a datasets.Dataset or a dict of them",
    "eval_use_gather_object": "no effect: predictions are gathered as objects",
    "bf16_full_eval": "evaluation outside training is in bfloat16; the model has its own precision again afterwards",
    "fp16_full_eval": "the same in float16",
    "fsdp": "version 2; shards the base under a prompt or LoRA; a whole model untested; not for unlearning layers",
    "fsdp_config": "the same",
    "include_for_metrics": "as in Trainer; losses are those of rows",
    "label_names": "entries of a collated batch, for compute_metrics",
    "length_column_name": "a column of lengths in tokens",
    "logging_nan_inf_filter": "no effect: training stops at a loss that is not finite",
    "model": "a prompt, layers, LoRA or a causal LM",
    "model_init": "returns what `model` may be; also for hyperparameter_search",
    "neftune_noise_alpha": "noise in the trained pass alone, not in the reference; on any base, also under layers",
    "optim_target_modules": "with GaLore and APOLLO, which read it, alone",
    "prediction_loss_only": "compute_metrics is not called",
    "remove_unused_columns": "columns that the collator reads stay",
    "resume_from_checkpoint": "for scripts; train(resume_from_checkpoint=True) takes the last complete one",
    "train_dataset": "also an IterableDataset, without a cached reference",
    "train_sampling_strategy": "text rows too, but for batch_rebalance",
}
"""Honored, with what an unlearning loss makes of them."""


@dataclass(frozen=True)
class Refused:
    """The only value that an option may have, and the reason."""

    only: Any
    reason: str


REFUSED = {
    "compute_loss_func": Refused(
        None, "would replace the unlearning loss; pass loss=UnlearningLoss(...) instead, with terms of your own."
    ),
    "label_smoothing_factor": Refused(
        0,
        "would replace the unlearning loss. Change that loss instead: "
        "SoftPromptUnlearner(..., loss=UnlearningLoss(forget=...)), or loss= for other models.",
    ),
    "use_liger_kernel": Refused(
        False,
        "would replace the model's forward by one without logits at single positions, which the unlearning loss "
        "reads. Leave it out: the loss computes logits at the response positions alone.",
    ),
    "liger_kernel_config": Refused(None, "configures use_liger_kernel, which is refused; leave it out."),
    "parallelism_config": Refused(
        None,
        "cuts rows or layers into pieces on several devices, but the unlearning loss reads whole rows of a whole "
        "model. Use one process per GPU (DDP), or FSDP.",
    ),
}
"""Refused, unless left at the only value possible."""

# What a collated batch may have; see `label_names`.
BATCH_ENTRIES = ("labels", "is_forget", "row_id", "is_rejected", "prompt_position", "input_ids", "attention_mask")

# Of `train_sampling_strategy` and `include_for_metrics`, and the default of `length_column_name`.
GROUPING = ("group_by_length", "batch_rebalance")
STRATEGIES = ("random", "sequential", *GROUPING)
METRIC_INPUTS = ("inputs", "loss")
LENGTH = TrainingArguments.__dataclass_fields__["length_column_name"].default


def refuse_options(args: TrainingArguments, arguments: Mapping[str, Any]) -> None:
    """Refuse options of `REFUSED`, and values that no evaluation could honor.

    Args:
        args: the training arguments.
        arguments: further arguments of `Trainer`, by name.

    Raises:
        ValueError: for an option that contradicts the unlearning loss or its batches.
        TypeError: for evaluation rows that are a stream.
    """
    for name, refused in REFUSED.items():
        value = arguments[name] if name in arguments else getattr(args, name, None)
        if value is not None and value != refused.only:
            raise ValueError(f"{name}={value!r} {refused.reason}")
    _check_values(args)
    if unknown := sorted(set(args.label_names or ()) - set(BATCH_ENTRIES)):
        raise ValueError(
            f"label_names={args.label_names!r}: a collated batch has no {', '.join(unknown)}; expected some of "
            f"{', '.join(BATCH_ENTRIES)}. Labels are made of the column completion: rename yours."
        )
    rows = arguments.get("eval_dataset")
    for name, split in (rows if isinstance(rows, dict) else {"eval_dataset": rows}).items():
        check_not_stream(split, name)


def _check_values(args: TrainingArguments) -> None:
    """Refuse values that `Trainer` takes and then ignores, or fails at in the midst of training.

    Raises:
        ValueError: for one.
    """
    asked = args.include_for_metrics or ()
    known = {
        "train_sampling_strategy": ([args.train_sampling_strategy], STRATEGIES),
        "include_for_metrics": ([asked] if isinstance(asked, str) else asked, METRIC_INPUTS),
    }
    for name, (values, allowed) in known.items():
        if unknown := [value for value in values if value not in allowed]:
            raise ValueError(
                f"{name}={getattr(args, name)!r}: {unknown[0]!r} is unknown; expected {', '.join(allowed)}."
            )
    if not is_finite_number(args.learning_rate) or args.learning_rate < 0:  # the optimizer's own check comes late
        raise ValueError(f"learning_rate={args.learning_rate!r}; expected a finite number of at least 0.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (whole_number(value := getattr(args, name), bools=False) or 0) < 1:
            raise ValueError(f"{name}={value!r}; expected a whole number from 1.")
    alpha = args.neftune_noise_alpha
    if alpha is not None and (not is_finite_number(alpha) or alpha < 0):
        raise ValueError(f"neftune_noise_alpha={alpha!r}; expected a finite number from 0, or None for no noise.")
    optimizer = OptimizerNames(args.optim).value
    if args.optim_target_modules is not None and not optimizer.startswith(("galore", "apollo")):
        raise ValueError(
            f"optim_target_modules={args.optim_target_modules!r} is read by GaLore and APOLLO only, and not by "
            f"optim={optimizer!r}; leave it out. The parameters that train are those that require gradients."
        )


def is_stream(rows: Any) -> bool:
    """Whether rows can only be read in their order, as those of an `IterableDataset` of datasets or torch."""
    return isinstance(rows, (IterableDataset, torch.utils.data.IterableDataset))


def check_not_stream(rows: Any, name: str) -> None:
    """Check that evaluation rows can be read by their numbers.

    Raises:
        TypeError: if they are a stream.
    """
    if is_stream(rows):
        raise TypeError(
            f"{name} is a stream ({type(rows).__name__}); evaluation needs a datasets.Dataset, as of its first rows: "
            "Dataset.from_list(list(rows.take(1000)))."
        )


def check_training_order(
    rows: Any,
    args: TrainingArguments,
    reference: str,
    loss: UnlearningLoss,
    forget_fraction: float | None,
    alternate: bool,
) -> None:
    """Check that training rows can be read in the order, and compared with the reference, that the options ask for.

    Raises:
        ValueError: for a stream of rows with an option that needs rows by their numbers; for `batch_rebalance` on
            rows without lengths; for a column of lengths that is not there; for a stream that is known to lack
            `is_forget`.
    """
    strategy = args.train_sampling_strategy
    if not is_stream(rows):
        columns = getattr(rows, "column_names", ())
        named = args.length_column_name
        if strategy in GROUPING and named != LENGTH and named not in columns:
            raise ValueError(
                f"length_column_name={named!r} names no column of train_dataset, which has "
                f"{list(columns) or 'none, as it is no datasets.Dataset'}; expected a column of numbers of tokens. "
                "Leave it out, and lengths are counted."
            )
        if strategy == "batch_rebalance" and not {args.length_column_name, "input_ids"} & set(columns):
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' needs the rows' lengths: tokenize them, "
                f"train_dataset.map(data_collator.tokenize), or add a column {args.length_column_name!r}."
            )
        return
    needs = ["reference='cached' (use reference='live')"] if reference == "cached" and loss.needs_reference else []
    needs += ["forget_fraction (give the share to forget_retain_stream)"] if forget_fraction is not None else []
    needs += ["alternate=True"] if alternate else []
    if strategy not in ("random", "sequential"):  # "random" is the default, and no wish
        needs.append(f"train_sampling_strategy={strategy!r}")
    if needs:
        raise ValueError(
            f"train_dataset is a stream ({type(rows).__name__}), whose rows come once and in their own order, and "
            f"cannot be used with {' or '.join(needs)}, by which rows are found by number. Leave that out, or load "
            "the rows as a datasets.Dataset."
        )
    if columns := getattr(rows, "column_names", None):
        check_is_forget(columns, "train_dataset")


def check_dispatch(rows: Any, config: Any, num_processes: int, pairs: bool = False) -> None:
    """Check that several processes do not share batches that are put together after padding, or pairs of rows.

    Args:
        rows: the training rows.
        config: the `AcceleratorConfig`.
        num_processes: number of processes.
        pairs: whether rows of a batch are pairs.

    Raises:
        ValueError: if they would.
    """
    dispatches = is_stream(rows) if config.dispatch_batches is None else config.dispatch_batches
    if num_processes > 1 and dispatches and pairs:
        raise ValueError(
            f"{num_processes} processes would share each batch, and with it the two rows of a pair. Let each read its "
            "own: TrainingArguments(accelerator_config={'dispatch_batches': False})."
        )
    if num_processes > 1 and dispatches and not config.split_batches:
        raise ValueError(
            f"{num_processes} processes would get their batches from the first one, which cannot join batches that "
            "are padded to different widths. Let each read its own: TrainingArguments(accelerator_config="
            "{'dispatch_batches': False})."
        )
