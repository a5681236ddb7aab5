"""The memorizing stage before unlearning: a model is fine-tuned on the rows that it will have to forget."""

from __future__ import annotations

import gc
import os
import tempfile
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from spul.data.collator import ForgetRetainCollator
from spul.losses.positions import response_positions
from spul.losses.terms import IGNORE_INDEX, as_float
from spul.models.causal_lm import logits_at
from spul.models.compat import keep_4bit_differentiable

Learner = Literal["full", "lora", "qlora"]

# Of the authors' qlora.py; the learning rate and the schedule are arguments.
PUBLISHED_MEMORIZING = {"warmup_steps": 0.05, "weight_decay": 1e-3, "max_grad_norm": 0.3}


def published_lora() -> LoraConfig:
    """LoRA of the memorizing stage as published (SPUL, arXiv 2406.12038; the authors' `qlora.py`).

    Rank 16, alpha 64 and dropout 0.1, on the projections that PEFT names for the model's family: in Llama and OPT
    the queries and values of attention.
    """
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=64, lora_dropout=0.1)


class CompletionTrainer(Trainer):
    """Fine-tunes a causal LM on completions; logits are computed at completion tokens alone.

    The loss is the mean cross-entropy over the completion tokens of the whole step, with label smoothing if the
    arguments set it. Batches are those of `ForgetRetainCollator.encoder.batch`.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        positions, targets = response_positions(inputs["labels"])
        passed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = logits_at(model, positions, **passed)
        if num_items_in_batch is None:
            count: Any = (targets != IGNORE_INDEX).sum()
        else:
            # Counted over the processes, over which DDP averages gradients.
            count = num_items_in_batch / (
                self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            )
        losses = F.cross_entropy(
            as_float(logits).flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        loss = losses / count
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def memorize(
    model: str | os.PathLike,
    rows: Dataset,
    collator: ForgetRetainCollator,
    args: TrainingArguments,
    learner: Learner = "full",
    dtype: torch.dtype = torch.float32,
    peft_config: PeftConfig | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fine-tune a model on the completions of rows.

    On all rows it returns the *base* of the papers' tables, on the retain rows alone the *retrained* model.

    Args:
        model: folder or Hub name of a causal LM.
        rows: `prompt` and `completion`; all of them are learned, whatever `is_forget` says.
        collator: for tokenizing and padding; its generic completions are not used.
        args: of training; `remove_unused_columns` is set to False.
        learner: `"full"`, all weights; `"lora"`, LoRA, merged afterwards; `"qlora"`, LoRA over weights in 4-bit NF4
            (arXiv 2305.14314), merged into the unquantized weights afterwards, since merging into 4-bit ones would
            round the result.
        dtype: type of the loaded and of the returned weights.
        peft_config: LoRA's config; `published_lora()` unless given. A family of which PEFT names no projections needs
            one, with `target_modules`.

    Returns:
        The model, bare and in evaluation mode, and the metrics of `Trainer.train` with `steps` beside them.

    Raises:
        ValueError: if `learner` is not known, `peft_config` comes with `"full"`, or there are no rows.
    """
    if learner not in ("full", "lora", "qlora"):
        raise ValueError(f"learner={learner!r} is not known; expected 'full', 'lora' or 'qlora'.")
    if learner == "full" and peft_config is not None:
        raise ValueError("peft_config is for learner='lora' or 'qlora'; 'full' trains the weights themselves.")
    if len(rows) == 0:
        raise ValueError("there are no rows to memorize.")
    args.remove_unused_columns = False
    quantization = None
    if learner == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    learning: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=quantization)
    if learner == "qlora":
        keep_4bit_differentiable(learning)
        learning = prepare_model_for_kbit_training(learning, use_gradient_checkpointing=args.gradient_checkpointing)
    if learner != "full":
        learning = get_peft_model(learning, peft_config or published_lora())
    trainer = CompletionTrainer(learning, args, collator.encoder.batch, rows)
    result = trainer.train()
    # A Trainer leaves its autocast wrapper on the model.
    learned: Any = trainer.accelerator.unwrap_model(learning, keep_fp32_wrapper=False)
    if learner == "lora":
        learned = learned.merge_and_unload()
    elif learner == "qlora":
        learned = _merged_unquantized(learned, model, dtype, args.device)
    return learned.eval(), {"steps": result.global_step, **result.metrics}


def _merged_unquantized(
    learned: PeftModel, model: str | os.PathLike, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Merge LoRA that was trained over 4-bit weights into the unquantized weights."""
    with tempfile.TemporaryDirectory() as folder:
        learned.save_pretrained(folder)
        del learned
        gc.collect()
        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return PeftModel.from_pretrained(whole.to(device), folder).merge_and_unload()
