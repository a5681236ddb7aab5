"""Requests that keep coming: several saved prompts for one base become one that honors them all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftType, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..data.checks import check_rows
from ..data.collator import ForgetRetainCollator
from ..losses.positions import response_positions
from ..losses.terms import KLDivergence
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import load_base, logits_at, max_positions
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.digests import fingerprint
from ..records.spul_config import SpulConfig, requests_of
from .trainer import UnlearningTrainer

Method = Literal["concatenate", "distill"]


def combine(
    model: nn.Module | str | os.PathLike,
    prompts: Sequence[str | os.PathLike],
    method: Method = "concatenate",
    *,
    num_virtual_tokens: int | None = None,
    train_dataset: Dataset | None = None,
    data_collator: ForgetRetainCollator | None = None,
    args: TrainingArguments | None = None,
    loss: UnlearningLoss | None = None,
    **trainer_kwargs: Any,
) -> SoftPromptUnlearner:
    """Make one prompt of several that were trained apart on one base.

    `"concatenate"` puts them one after the other, in the order given, and trains nothing. Prompt tuning and P-tuning
    give a prompt of prompt tuning, prefix tuning a prefix without projection. No prompt has seen the others while it
    trained, so measure what comes out.

    `"distill"` trains one prompt of a given length, which starts from virtual tokens of all the others:

    - on rows with `is_forget`, such as the stored forget sets of all requests beside a retain set
      (`forget_retain_dataset`), by the unlearning loss, as `UnlearningTrainer` does;
    - on rows without it, where the forget sets are gone, towards the prompts' own behavior. With `p_0` for the base
      and `p_i` for it under prompt `i`, the teacher of an input `x` with completion `y` is the prompt that changes the
      base's answer most, chosen once before training:
      `t(x) = argmax_i sum over k KL(p_i(. | x, y_<k) || p_0(. | x, y_<k))`.
      The loss is the mean of `sum over k KL(p_t(x)(. | x, y_<k) || p(. | x, y_<k))`. Where no prompt changes
      the answer, whichever is the teacher says what the base says. With generic completions in the collator, every
      input is also followed along one of these, since what a prompt says after a generic answer has begun cannot be
      learned on the true one.

    To revoke a request, combine the others anew.

    Args:
        model: the base, or its name or folder, which is then loaded with `AutoModelForCausalLM`.
        prompts: folders or Hub names of the saved prompts: two or more, for `"distill"` one or more.
        method: `"concatenate"` or `"distill"`.
        num_virtual_tokens: the length that `"distill"` trains; that of the longest prompt unless given.
        train_dataset: `"distill"` only: rows with `prompt` and `completion`, as text or tokenized; with `is_forget`
            in all of them or in none.
        data_collator: `"distill"` only: tokenizes, pads, and has the generic completions.
        args: `"distill"` only: of the training.
        loss: for rows with `is_forget`: what is trained for; `UnlearningLoss()` unless given.
        trainer_kwargs: `"distill"` only: further arguments of `UnlearningTrainer`, such as `eval_dataset`,
            `callbacks`, or, for rows with `is_forget`, `forget_fraction`.

    Returns:
        The base under the new prompt, in evaluation mode, to use or to save. To train on, save it and load it with
        `is_trainable=True`. Its record has the forget sets' summaries in `combined_from`; its own `forget` and
        `retain` are what it was itself trained on, None where that were no such rows.

    Raises:
        ValueError: for too few prompts or the same one twice; for prefix tuning among other kinds; for more virtual
            tokens than the prompts or the model's positions have; for arguments that the method does not take.
        TypeError: for what is no soft prompt, or no sequence of them.

    Warns:
        UserWarning: if a prompt was trained on other weights than this base has.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; expected 'concatenate' or 'distill'.")
    if method == "concatenate":
        training = {"num_virtual_tokens": num_virtual_tokens, "train_dataset": train_dataset, "args": args}
        given = {**training, "data_collator": data_collator, "loss": loss, **trainer_kwargs}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"concatenation trains nothing and takes no {', '.join(unused)}; use method='distill'.")
        parts = _load(model, prompts, at_least=2)
        return _under(parts[0], torch.cat([virtual_tokens(part) for part in parts]), _record(parts))

    if train_dataset is None or data_collator is None or args is None:
        raise ValueError("method='distill' trains a prompt: pass train_dataset, data_collator and args.")
    check_rows(train_dataset, columns=(), name="train_dataset")
    parts = _load(model, prompts, at_least=1)
    rows = torch.cat([virtual_tokens(part) for part in parts])
    num = max(len(virtual_tokens(part)) for part in parts) if num_virtual_tokens is None else num_virtual_tokens
    if not 1 <= num <= len(rows):
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens}: the prompts together have {len(rows)}; expected 1 to as many."
        )
    student = SoftPromptUnlearner(parts[0].get_base_model(), _config(parts[0], num))
    with torch.no_grad():
        virtual_tokens(student).copy_(_spread(rows, num))
    flagged = "is_forget" in train_dataset.column_names
    if flagged:
        student.loss = UnlearningLoss() if loss is None else loss
        trainer = UnlearningTrainer(student, args, data_collator, train_dataset, **trainer_kwargs)
    else:
        if loss is not None:
            raise ValueError("loss is for rows with is_forget; without, the prompts' own behavior is learned.")
        trainer = _TeachingTrainer(student, parts, train_dataset, data_collator, args, **trainer_kwargs)
    trainer.train()
    record = student.spul_config
    record.combined_from = requests_of(part.spul_config for part in parts)
    if flagged:
        record.loss = student.loss.to_dict()
    else:
        record.forget = record.retain = None  # the inputs are neither
    return _under(parts[0], virtual_tokens(student).detach(), record)


# ---- prompts ----


def virtual_tokens(unlearner: SoftPromptUnlearner) -> Tensor:
    """A saved or plain prompt as rows, one for each virtual token: (p, width).

    For prefix tuning a row holds the keys and values of all layers, so that rows can be joined for all kinds alike.
    """
    return unlearner.prompt_encoder[unlearner.active_adapter].embedding.weight


def _load(
    model: nn.Module | str | os.PathLike, prompts: Sequence[str | os.PathLike], at_least: int
) -> list[SoftPromptUnlearner]:
    """Each prompt before the one base, checked to fit it and each other."""
    if isinstance(prompts, (str, os.PathLike)):
        raise TypeError(f"prompts={str(prompts)!r} is one prompt; expected a list of them.")
    if len(prompts) < at_least:
        raise ValueError(
            f"prompts={list(map(str, prompts))}: expected at least {at_least}. One that is left alone, as when others "
            "were revoked, needs no combining: load it with SoftPromptUnlearner.from_pretrained."
        )
    base = load_base(model, {})
    parts = [SoftPromptUnlearner.from_pretrained(base, prompt) for prompt in prompts]
    kinds = [PeftType(part.active_peft_config.peft_type) for part in parts]
    if PeftType.PREFIX_TUNING in kinds and len(set(kinds)) > 1:
        raise ValueError(
            f"prompts are of the kinds {', '.join(kind.value for kind in kinds)}: prefix tuning, which learns keys "
            "and values, cannot be joined with prompts that stand before the input. Combine each sort by itself."
        )
    for i, part in enumerate(parts):
        for j in range(i):
            if torch.equal(virtual_tokens(part), virtual_tokens(parts[j])):
                raise ValueError(f"{str(prompts[j])!r} and {str(prompts[i])!r} hold the same prompt; give each once.")
    return parts


def _config(like: SoftPromptUnlearner, num_virtual_tokens: int, inference_mode: bool = False) -> PeftConfig:
    """The config of a plain prompt of the same sort: prompt tuning, or prefix tuning without projection."""
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    shared["inference_mode"] = inference_mode
    old: Any = like.active_peft_config
    if old.peft_type == PeftType.PREFIX_TUNING:
        sizes = ("token_dim", "num_layers", "num_attention_heads")
        return PrefixTuningConfig(**shared, **{name: getattr(old, name) for name in sizes})
    return PromptTuningConfig(**shared)


def _under(like: SoftPromptUnlearner, rows: Tensor, record: SpulConfig) -> SoftPromptUnlearner:
    """The base of another unlearner under a finished prompt with these virtual tokens."""
    base: Any = like.get_base_model()
    limit = max_positions(base)
    if limit is not None and len(rows) >= limit:
        raise ValueError(
            f"{len(rows)} virtual tokens leave no room for an input among the model's {limit} positions; use "
            "method='distill' with a smaller num_virtual_tokens."
        )
    unlearner = SoftPromptUnlearner(base, _config(like, len(rows), inference_mode=True))
    with torch.no_grad():
        virtual_tokens(unlearner).copy_(rows)
    unlearner.spul_configs[unlearner.active_adapter] = record
    return unlearner.eval()


def _spread(rows: Tensor, num: int) -> Tensor:
    """So many of the rows, at even intervals: of every prompt about the same share.

    Virtual tokens as they were trained start better than means of several, such as k-means centers.
    """
    return rows[torch.linspace(0, len(rows) - 1, num, dtype=torch.float64).round().long().to(rows.device)]


# ---- the record ----


def _record(parts: Sequence[SoftPromptUnlearner]) -> SpulConfig:
    """What can be said of prompts put one after the other.

    Not the sizes of their forget and retain sets together: digests do not tell which rows they share.
    """
    configs, here = [part.spul_config for part in parts], fingerprint(parts[0].get_base_model())
    generic = [config.generic_completions for config in configs]
    union = list(dict.fromkeys(text for texts in generic for text in texts or []))
    return SpulConfig(
        generic_completions=None if None in generic else union,
        # One that was trained on other weights goes on to warn.
        base_fingerprint=next((c.base_fingerprint for c in configs if c.base_fingerprint not in (None, here)), here),
        combined_from=requests_of(configs),
    )


# ---- learning from the prompts themselves ----


class _Teachers:
    """What each input's teacher says, in the place of what the frozen model says."""

    def __init__(self, prompts: Sequence[SoftPromptUnlearner], teacher_of: Tensor) -> None:
        self.prompts, self.teacher_of = prompts, teacher_of

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K, V) at the response positions of a batch with `row_id`."""
        positions, _ = response_positions(batch["labels"])
        teacher = self.teacher_of[batch["row_id"].cpu()].to(positions.device)
        by_teacher = [(teacher == i).nonzero().flatten() for i in range(len(self.prompts))]
        found = [
            prompt.response_logits(batch["input_ids"][rows], batch["attention_mask"][rows], positions[rows])
            for prompt, rows in zip(self.prompts, by_teacher, strict=True)
            if len(rows)
        ]
        return torch.cat(found)[torch.cat(by_teacher).argsort()]


class _TeachingTrainer(UnlearningTrainer):
    """Trains a prompt on inputs towards what each one's teacher says.

    Each input is followed along its own completion and, as if it were to be forgotten, along a generic one.
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
        inputs = inputs.remove_columns([name for name in ("row_id",) if name in inputs.column_names])
        inputs = inputs.add_column("row_id", list(range(len(inputs))))
        ways = (False,) if collator.generic_completions is None else (False, True)
        rows = concatenate_datasets([inputs.add_column("is_forget", [way] * len(inputs)) for way in ways])
        towards = KLDivergence(direction="forward")
        student.loss = UnlearningLoss(alpha=0.0, beta=1.0, forget=towards, kl=towards)
        super().__init__(student, args, collator, rows, **kwargs)
        self._teachers, self._inputs = teachers, inputs

    def _open_reference(self) -> None:
        teacher_of = _choose_teachers(self._teachers, self._inputs, self._collator, self.args)
        self._reference: Any = _Teachers(self._teachers, teacher_of)


@torch.no_grad()
def _choose_teachers(
    prompts: Sequence[SoftPromptUnlearner], inputs: Dataset, collator: ForgetRetainCollator, args: TrainingArguments
) -> Tensor:
    """Which prompt moves the base's answer furthest, for each input: (rows,)."""
    base: Any = prompts[0].get_base_model()
    device = next(base.parameters()).device
    for prompt in prompts:
        prompt.prompt_encoder.to(device)
    divergence, chosen = KLDivergence(direction="reverse"), []
    size = args.per_device_eval_batch_size
    for start in tqdm(range(0, len(inputs), size), "choosing teachers", disable=args.disable_tqdm, leave=False):
        batch = collator.encoder.batch([inputs[i] for i in range(start, min(start + size, len(inputs)))])
        ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        positions, targets = response_positions(labels)
        frozen = logits_at(base, positions, input_ids=ids, attention_mask=mask, use_cache=False)
        moved = [divergence(prompt.response_logits(ids, mask, positions), targets, frozen) for prompt in prompts]
        chosen.append(torch.stack(moved).argmax(dim=0).cpu())
    return torch.cat(chosen)
