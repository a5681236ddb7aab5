"""Several saved prompts of one base, distilled into one that serves all their requests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftType, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..data.checks import check_rows
from ..data.collator import ForgetRetainCollator, checked_collator
from ..data.rows import concatenated, rows_at, with_column
from ..losses.positions import response_positions
from ..losses.terms import KLDivergence
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import logits_at, unchanged_on_error
from ..models.compat_devices import device_of
from ..models.loading import load_base
from ..prompts.configs import check_causal_lm
from ..prompts.shared_prefix import is_prefix
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.fields import is_count
from ..records.spul_config import requests_of
from .trainer import UnlearningTrainer


def combine(
    model: nn.Module | str | os.PathLike,
    prompts: Sequence[str | os.PathLike],
    *,
    train_dataset: Dataset,
    data_collator: ForgetRetainCollator,
    args: TrainingArguments,
    num_virtual_tokens: int | None = None,
    loss: UnlearningLoss | None = None,
    **trainer_kwargs: Any,
) -> SoftPromptUnlearner:
    """Distill several prompts, trained separately on one base, into one prompt.

    It starts from virtual tokens of all of them, at even intervals, and trains:

    - on rows with `is_forget`, such as the stored forget sets of all requests beside a retain set
      (`forget_retain_dataset`), with the unlearning loss, as `UnlearningTrainer` does;
    - on rows without it, where the forget sets are gone, toward the prompts' own behavior. With `p_0` for the base
      and `p_i` for the base under prompt `i`, the teacher of an input `x` with completion `y` is the prompt that
      changes the base's distribution most, chosen once before training:
      `t(x) = argmax_i sum over k KL(p_i(. | x, y_<k) || p_0(. | x, y_<k))`.
      The loss is the mean of `sum over k KL(p_t(x)(. | x, y_<k) || p(. | x, y_<k))`. If the collator has generic
      completions, every input is also trained along one of these, since a prompt's distribution after the start of a
      generic answer cannot be learned on the true completion.

    To revoke a request, combine the others anew.

    Args:
        model: the base, or its name or folder, which is then loaded with `AutoModelForCausalLM`.
        prompts: one or more folders or Hub names of saved prompts.
        train_dataset: rows with `prompt` and `completion`, as text or tokenized; with `is_forget` and `row_id` in all
            of them, or without `is_forget`.
        data_collator: tokenizes, pads, and has the generic completions.
        args: of the training.
        num_virtual_tokens: length of the new prompt; None takes that of the longest prompt.
        loss: the objective for rows with `is_forget`; None is `UnlearningLoss()`.
        trainer_kwargs: further arguments of `UnlearningTrainer`, such as `eval_dataset`, `callbacks`, or, for rows
            with `is_forget`, `forget_fraction`, `reference`, `reference_dir` and `digest_key`.

    Returns:
        The base under the new prompt, in evaluation mode, to use or to save: of prompt tuning, or of prefix tuning
        without projection. To continue training, save it and load it with `is_trainable=True`. Its record has the
        forget sets' summaries in `combined_from`; `forget` and `retain` summarize its own training rows, and are None
        if these had no `is_forget`.

    Raises:
        ValueError: for no prompt or the same one twice; for prefix tuning among other kinds; for prompts of different
            positions; for more virtual tokens than the prompts have together; for arguments that are of no effect on
            rows without `is_forget`, such as `loss`; for `push_to_hub` in `args`.
        TypeError: for an adapter that is no soft prompt, a base that has an adapter, a single path instead of a list,
            or rows that are no `datasets.Dataset`.

    Warns:
        UserWarning: if a prompt was trained on other weights than this base has.
    """
    check_no_upload(args)
    check_rows(train_dataset, columns=(), name="train_dataset")
    checked_collator(data_collator, "data_collator")
    if isinstance(prompts, (str, os.PathLike)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts={prompts!r:.80}; expected a list of folders or Hub names of saved prompts.")
    if not (prompts := list(prompts)):
        raise ValueError("prompts is empty; expected one or more saved prompts.")
    base = load_base(model, {})
    check_causal_lm(base)
    with unchanged_on_error(base):
        parts = _load(base, prompts)
        rows = torch.cat([virtual_tokens(part) for part in parts])
        num = max(len(virtual_tokens(part)) for part in parts) if num_virtual_tokens is None else num_virtual_tokens
        if not is_count(num, least=1) or num > len(rows):
            raise ValueError(
                f"num_virtual_tokens={num_virtual_tokens!r}: the prompts together have {len(rows)}; expected 1 "
                "to as many."
            )
        position = parts[0].spul_config.prompt_position
        student = SoftPromptUnlearner(base, _config(parts[0], num), prompt_position=position, start="peft")
        with torch.no_grad():
            virtual_tokens(student).copy_(_evenly_spaced(rows, num))
        flagged = "is_forget" in train_dataset.column_names
        if flagged:
            student.loss = UnlearningLoss() if loss is None else loss
            trainer = UnlearningTrainer(student, args, data_collator, train_dataset, **trainer_kwargs)
        else:
            if loss is not None:
                raise ValueError("loss is for rows with is_forget; rows without it are trained toward the prompts.")
            for name in ("reference", "reference_dir", "digest_key"):
                if trainer_kwargs.get(name) is not None:
                    raise ValueError(f"{name} is for rows with is_forget, and of no effect on rows without it.")
            trainer = _DistillationTrainer(student, parts, train_dataset, data_collator, args, **trainer_kwargs)
        trainer.train()
        record = student.spul_config
        record.combined_from = requests_of(part.spul_config for part in parts)
        if flagged:
            record.loss = student.loss.to_dict()
        else:
            # The inputs are neither forget nor retain rows.
            record.loss = record.forget = record.retain = record.rewritten = None
        combined = SoftPromptUnlearner(base, _config(parts[0], num, inference_mode=True), prompt_position=position)
        with torch.no_grad():
            virtual_tokens(combined).copy_(virtual_tokens(student))
        combined.spul_configs[combined.active_adapter] = record
        return combined.eval()


def check_no_upload(args: TrainingArguments) -> None:
    """Raise if the training would upload its checkpoints, from which the new prompt is only made."""
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub would upload the checkpoints of a training, from which the new prompt is only made; leave it "
            "out, and upload the new prompt afterwards, by its push_to_hub, or the folder that it was saved into: hf "
            "upload REPOSITORY FOLDER."
        )


# ---- prompts ----


def virtual_tokens(unlearner: SoftPromptUnlearner) -> Tensor:
    """The virtual tokens of a saved or plain prompt: (p, width).

    For prefix tuning a row holds the keys and values of all layers.
    """
    return unlearner.prompt_encoder[unlearner.active_adapter].embedding.weight


def _load(base: Any, prompts: Sequence[str | os.PathLike]) -> list[SoftPromptUnlearner]:
    """The base under each prompt, after a check that the prompts fit it and each other."""
    parts = [SoftPromptUnlearner.from_pretrained(base, prompt) for prompt in prompts]
    kinds = [PeftType(part.active_peft_config.peft_type) for part in parts]
    if len({is_prefix(part) for part in parts}) > 1:
        raise ValueError(
            f"prompts are of the kinds {', '.join(kind.value for kind in kinds)}: prefix tuning, which learns keys "
            "and values, cannot be joined with prompts of input embeddings. Combine each sort by itself."
        )
    if len(found := {part.spul_config.prompt_position for part in parts}) > 1:
        raise ValueError(
            f"prompts stand at different positions, {', '.join(map(repr, sorted(found)))}; the new one stands at "
            "one of them. Combine each sort by itself."
        )
    for i, part in enumerate(parts):
        for j in range(i):
            if torch.equal(virtual_tokens(part), virtual_tokens(parts[j])):
                raise ValueError(f"{str(prompts[j])!r} and {str(prompts[i])!r} hold the same prompt; give each once.")
    return parts


def _config(like: SoftPromptUnlearner, num_virtual_tokens: int, inference_mode: bool = False) -> PeftConfig:
    """The config of a plain prompt of the same kind: prompt tuning, or prefix tuning without projection."""
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    shared["inference_mode"] = inference_mode
    old: Any = like.active_peft_config
    if is_prefix(like):
        sizes = ("token_dim", "num_layers", "num_attention_heads")
        return PrefixTuningConfig(**shared, **{name: getattr(old, name) for name in sizes})
    return PromptTuningConfig(**shared)


def _evenly_spaced(rows: Tensor, num: int) -> Tensor:
    """`num` of the rows at even intervals, so that every prompt has about the same share.

    Trained virtual tokens start better than means of several, such as k-means centers.
    """
    return rows[torch.linspace(0, len(rows) - 1, num, dtype=torch.float64).round().long().to(rows.device)]


# ---- distillation from the prompts themselves ----


class _Teachers:
    """The logits of each input's teacher, in place of the base model's: a `ReferenceCache` to the trainer."""

    def __init__(self, prompts: Sequence[SoftPromptUnlearner], teacher_of: Tensor) -> None:
        self.prompts, self.teacher_of = prompts, teacher_of

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K, V) at the response positions of a batch with `row_id`."""
        positions, _ = response_positions(batch["labels"])
        teacher = self.teacher_of[batch["row_id"].cpu()].to(positions.device)
        by_teacher = [(teacher == i).nonzero().flatten() for i in range(len(self.prompts))]
        at = batch.get("prompt_position")
        found = [
            prompt.response_logits(
                batch["input_ids"][rows],
                batch["attention_mask"][rows],
                positions[rows],
                prompt_position=None if at is None else at[rows],
            )
            for prompt, rows in zip(self.prompts, by_teacher, strict=True)
            if len(rows)
        ]
        return torch.cat(found)[torch.cat(by_teacher).argsort()]


class _DistillationTrainer(UnlearningTrainer):
    """Trains a prompt toward the distribution of each input's teacher.

    Each input is trained along its own completion and, as if it were a forget row, along a generic one.
    """

    def __init__(
        self,
        student: SoftPromptUnlearner,
        teachers: Sequence[SoftPromptUnlearner],
        inputs: Dataset,
        collator: ForgetRetainCollator,
        args: TrainingArguments,
        **kwargs: Any,
    ) -> None:
        inputs = with_column(inputs, "row_id", list(range(len(inputs))))
        flags = (False,) if collator.generic_completions is None else (False, True)
        rows = concatenated([with_column(inputs, "is_forget", [flag] * len(inputs)) for flag in flags])
        divergence = KLDivergence(direction="forward", reduction="sum")  # the same on both sides
        student.loss = UnlearningLoss(alpha=0.0, beta=1.0, forget=divergence, kl=divergence)
        super().__init__(student, args, collator, rows, **kwargs)
        self._teachers, self._inputs = teachers, inputs

    def _check_rows(self) -> None:
        """Nothing to check: each input comes once or twice under one number, whatever its side."""

    def _open_reference(self) -> None:
        teacher_of = _choose_teachers(self._teachers, self._inputs, self._collator, self.args)
        self._reference: Any = _Teachers(self._teachers, teacher_of)


@torch.no_grad()
def _choose_teachers(
    prompts: Sequence[SoftPromptUnlearner], inputs: Dataset, collator: ForgetRetainCollator, args: TrainingArguments
) -> Tensor:
    """The index of the prompt with the largest divergence from the base, for each input: (rows,)."""
    base: Any = prompts[0].get_base_model()
    device = device_of(base)
    for prompt in prompts:
        prompt.prompt_encoder.to(device)
    divergence, chosen = KLDivergence(direction="reverse"), []
    size = args.per_device_eval_batch_size
    for start in tqdm(range(0, len(inputs), size), "choosing teachers", disable=args.disable_tqdm, leave=False):
        batch = collator.encoder.batch(rows_at(inputs, range(start, min(start + size, len(inputs)))))
        ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        positions, targets = response_positions(labels)
        frozen = logits_at(base, positions, input_ids=ids, attention_mask=mask, use_cache=False)
        at = batch.get("prompt_position")
        logits = (prompt.response_logits(ids, mask, positions, prompt_position=at) for prompt in prompts)
        moved = [divergence(found, targets, frozen) for found in logits]
        chosen.append(torch.stack(moved).argmax(dim=0).cpu())
    return torch.cat(chosen)
