"""SoftPromptUnlearner: a frozen causal language model with a trainable soft prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, TaskType
from torch import Tensor, nn

from ..losses.batch import batch_loss
from ..losses.multiplier import RetainMultiplier
from ..losses.unlearning_loss import UnlearningLoss
from ..models.causal_lm import logits_at, unchanged_on_error
from ..models.compat import is_sharded, keep_4bit_differentiable, say_kernels_once
from ..models.compat_checkpointing import switching, unswitched
from ..models.disabling import is_disabled_here
from ..models.noise import keep_in_evaluation, zero_dropout
from ..models.sharding import keep_rest_whole
from . import checkpoint
from .adapters import PromptAdapters
from .arguments import METHODS_OF_THE_BASE, METHODS_OF_WEIGHTS
from .configs import check_causal_lm, check_peft_config, check_promptable, filled
from .generation import generate_disabled, generate_prompted
from .inference import named_forward, ordinary_forward
from .names import NO_PROMPT, check_adapter_names
from .position import check_position, stands_inside
from .probe import check_prefix
from .row_prompts import RowPrompts, under
from .shared_prefix import cached_prompts, is_prefix
from .starts import Start, check_start, start_prompt


class SoftPromptUnlearner(PromptAdapters):
    """A frozen causal LM with a trainable soft prompt that makes it forget (SPUL, arXiv 2406.12038).

    The base is frozen in place and its dropout set to zero; only the active prompt requires gradients. It is an
    ordinary `PeftModelForCausalLM`: plain PEFT loads what it saves, unless the prompt stands at `"message"`.

    Args:
        model: a causal LM of transformers, in any floating type, 8 or 4 bit.
        peft_config: `PromptTuningConfig`, `PromptEncoderConfig` (P-tuning, the paper's), `PrefixTuningConfig` or
            `CartridgeConfig`.
        loss: the objective; `UnlearningLoss()` unless given.
        adapter_name: PEFT's name of the adapter.
        prompt_position: `"start"` (default), in front of every row, or `"message"`, inside it, just before what is
            asked, see `spul.data.RowEncoder`. Prefix tuning stands at the start alone.
        start: how the prompt begins. "random": as the embedding of BOS and random ones, alike among themselves, at
            the scale of the vocabulary's; "vocabulary": as embeddings of drawn tokens; "peft": as PEFT initializes
            it; `InstructionStart(text, tokenizer)`: as the embeddings of a written instruction. Prefix tuning begins
            as the keys and values that the base computes for these, or, by `DiscriminativeStart(dataset, collator)`,
            with keys fitted to tell forget rows from others. `NearStart(dataset, collator)` draws the default again
            until it is near the base on rows. The default is "peft" for P-tuning, "random" for
            the others; PEFT's own options (`prompt_tuning_init`, `init_weights`) are honored where it is not given.

    Raises:
        TypeError: if `peft_config` is none of the four, `loss` is not an `UnlearningLoss`, or `model` is not a module,
            has an adapter, is an encoder-decoder, or has no language modeling head.
        ValueError: if its task type is not `CAUSAL_LM`, it has no virtual tokens, weights of `model` are on the meta
            device, the family cannot be put under this kind of prompt, or it cannot stand at `prompt_position`.

    Example:
        ```python
        unlearner = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30))
        out = unlearner(**collator(rows))
        out.loss.backward()
        ```
    """

    in_words = "the prompt"
    computes_loss = True
    takes_adapter_names = True
    takes_prompt_position = True
    hides_pads = True

    # Set by PEFT; declared here since nn.Module types every attribute as a tensor or a module.
    config: Any
    word_embeddings: Any
    prompt_encoder: Any
    _multiplier: RetainMultiplier | None = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        loss: UnlearningLoss | None = None,
        adapter_name: str = "default",
        prompt_position: str = "start",
        start: Start | None = None,
        **kwargs: Any,
    ) -> None:
        check_peft_config(peft_config)
        check_position(prompt_position, peft_config)
        check_start(start, peft_config)
        check_causal_lm(model)
        loss = UnlearningLoss() if loss is None else loss
        if not isinstance(loss, UnlearningLoss):
            raise TypeError(f"loss={loss!r}: expected an UnlearningLoss, such as UnlearningLoss(alpha=1.0, beta=0.5).")
        check_promptable(model, peft_config)
        keep_rest_whole(model)
        peft_config = filled(model, peft_config)
        peft_config.task_type = TaskType.CAUSAL_LM
        with unchanged_on_error(model):
            zero_dropout(model)  # first: the model's config may be another one then, and PEFT keeps it, too
            super().__init__(model, peft_config, adapter_name, **kwargs)
            self.spul_config.prompt_position = prompt_position
            keep_4bit_differentiable(model)  # before a forward, in which layers would repack their weights
            say_kernels_once(model)
            if is_prefix(self) and not is_sharded(model):
                check_prefix(self)
            self.loss = loss
            keep_in_evaluation(model)
            model.requires_grad_(False)
            if not peft_config.inference_mode:
                start_prompt(self, adapter_name, start)

    # ---- the protocol of an unlearner ----

    @contextmanager
    def cached_prompts(self) -> Iterator[None]:
        """Context manager: the prompts pass through the base once for all calls inside, not once for each.

        For serving and evaluation, where the base does not change. A changed prompt, weight or hook is noticed all
        the same; a weight written through `.data`, a buffer, an attribute or a method of the base is not.
        """
        with cached_prompts(self):
            yield

    @property
    def multiplier(self) -> RetainMultiplier | None:
        """The multiplier of a loss with `retain_budget`, whose alpha `forward` uses; None for a fixed alpha.

        A loop of one's own calls `unlearner.multiplier.update(out)` after each optimizer step. A new `loss` has a new
        one.
        """
        if self.loss.retain_budget is None:
            return None
        if self._multiplier is None or self._multiplier.loss is not self.loss:
            self._multiplier = RetainMultiplier(self.loss)
        return self._multiplier

    # ---- forward ----

    def train(self, mode: bool = True) -> SoftPromptUnlearner:
        """Set the mode, as of every module; it waits for a forward of another thread that depends on it.

        Modules of the base that would draw at random in training mode, such as PhiMoE's routers, stay in evaluation.
        """
        with switching:
            super().train(mode)
            keep_in_evaluation(self.get_base_model())
        return self

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        is_forget: Tensor | None = None,
        row_id: Tensor | None = None,
        group_counts: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        reference_logits: Tensor | None = None,
        alpha: Tensor | float | None = None,
        is_rejected: Tensor | None = None,
        prompt_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the unlearning loss of a batch, or, without `is_forget`, the output of an ordinary PEFT forward.

        Args:
            input_ids: (B, n), padded on either side, without virtual tokens.
            attention_mask: (B, n); all ones unless given.
            labels: (B, n), the response's token ids, -100 elsewhere.
            is_forget: (B,) bool or 0/1.
            row_id: (B,), the rows' ids in the data set; not used here.
            group_counts: (2,), the divisors of the sums over forget and over retain rows: their numbers of rows in
                this batch unless given. With gradient accumulation pass those of the whole step, under DDP averaged
                over processes, since DDP averages gradients.
            num_items_in_batch: number of label tokens in the whole step, as `transformers.Trainer` passes it: without
                `group_counts`, this batch weighs as its share of them.
            reference_logits: (R, K, V), the base model's logits at the response tokens of the R rows whose loss
                compares with it (by default the retain rows), from `ReferenceCache.logits`; computed unless given.
            alpha: under `retain_budget` the weight of the retain term; that of `multiplier` unless given.
            is_rejected: (B,) bool, which rows have the rejected response of a pair, as `ForgetRetainCollator` with
                `pairs=True` returns it, for a loss that compares two responses.
            prompt_position: (B,), the number of each row's tokens before a prompt at `"message"`; prompts at the start
                do not use it.
            kwargs: arguments of the ordinary forward; `adapter_names=[...]` names each row's prompt, `"__base__"` for
                none.

        Returns:
            `UnlearnerOutput`, or the output of the base model. Its logits under prompt tuning and P-tuning include
            those at the p virtual tokens, in front: (B, p + n, V). With `adapter_names`, and under a prompt at
            `"message"`, they are (B, n, V), and each predicts the row's next token.

        Raises:
            ValueError: if tensors are missing, or their shapes do not match; if rows and prompt exceed the model's
                positions (without `is_forget` only where the base would fail).
            TypeError: if arguments of the ordinary forward come with `is_forget`, or those of the loss without it.
        """
        names = kwargs.pop("adapter_names", None)
        if is_forget is None:
            own = {"group_counts": group_counts, "reference_logits": reference_logits, "alpha": alpha}
            own["is_rejected"] = is_rejected
            if given := sorted(name for name, value in own.items() if value is not None):
                raise TypeError(f"without is_forget, forward takes no {', '.join(given)}: they are of the loss.")
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            if not self.enabled and not _names_rows_of_the_base(self, names):
                base: Any = self.get_base_model()
                _check_names(self, names, input_ids)
                return base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            with unswitched(self.get_base_model()):
                view = under(self, self.active_adapter)  # whichever is set meanwhile
                if names is not None or stands_inside(view):
                    return named_forward(view, names, input_ids, attention_mask, labels, prompt_position, **kwargs)
                concatenated = super(SoftPromptUnlearner, view).forward
                return ordinary_forward(view, concatenated, input_ids, attention_mask, labels, **kwargs)
        if names is not None:
            kwargs["adapter_names"] = names  # refused: a batch that trains is under the active prompt
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and name != "return_dict"):
            raise TypeError(f"with is_forget, forward takes no {', '.join(unknown)}; leave out is_forget to use them.")
        if input_ids is None or labels is None:
            raise ValueError(
                "with is_forget, forward needs input_ids and labels, as ForgetRetainCollator returns them."
            )
        if alpha is None and (multiplier := self.multiplier) is not None:
            alpha = multiplier.alpha_of_pass() if torch.is_grad_enabled() else multiplier.alpha
        out = batch_loss(
            self.loss,
            *self.reads(self.loss.reads_layer),
            input_ids,
            labels,
            is_forget,
            attention_mask=attention_mask,
            group_counts=group_counts,
            num_items_in_batch=num_items_in_batch,
            reference_logits=reference_logits,
            alpha=alpha,
            is_rejected=is_rejected,
            prompt_position=prompt_position,
        )
        if out.loss is not None and out.loss.requires_grad:
            self.parameters_changed()
        return out

    def response_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        adapter_names: Sequence[str] | None = None,
        prompt_position: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, V) at `positions` of a right-padded batch; the base's when the prompt is disabled.

        Args:
            input_ids: (B, n), without virtual tokens.
            attention_mask: (B, n).
            positions: (B, K), counted without virtual tokens.
            adapter_names: for each row the name of its prompt, or `"__base__"`; the active one unless given.
            prompt_position: (B,), as in `forward`.

        Raises:
            ValueError: if rows and prompt exceed the model's positions, for names that the model does not have, and
                for a prompt at `"message"` without `prompt_position`.
        """
        if not self.enabled:
            _check_names(self, adapter_names, input_ids)
            return self.base_logits(input_ids, attention_mask, positions)
        prompts = RowPrompts(self, len(input_ids), adapter_names, prompt_position)
        with unswitched(self.get_base_model()):
            return prompts.response_logits(input_ids, attention_mask, positions)

    def base_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) of the base, without the prompt; arguments as in `response_logits`."""
        return RowPrompts(self, len(input_ids), [NO_PROMPT] * len(input_ids)).response_logits(
            input_ids, attention_mask, positions
        )

    def embedding_logits(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        prompt_position: Tensor | None = None,
    ) -> Tensor:
        """`response_logits` from input embeddings (B, n, d).

        Raises:
            ValueError: if rows and prompt exceed the model's positions, and for prefix tuning under gradient
                checkpointing, where the base drops the prefix under it.
        """
        base: Any = self.get_base_model()
        if not self.enabled:
            return logits_at(base, positions, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        prompts = RowPrompts(self, len(inputs_embeds), prompt_position=prompt_position)
        with unswitched(base):
            return prompts.embedding_logits(inputs_embeds, attention_mask, positions)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate with the prompt; arguments as in `generate` of transformers.

        Args:
            inputs: (B, n) token ids, also as `input_ids`, padded on either side with a matching `attention_mask`.
            args: further positional arguments of `generate`.
            kwargs: further arguments, such as `max_new_tokens`; `adapter_names=[...]` names each row's prompt,
                `"__base__"` for none; `prompt_position=`, as in `forward`, for prompts at `"message"`.

        Returns:
            As in transformers: the input ids, padded as given, then the new tokens.

        Raises:
            ValueError: for arguments and settings that do not go with a prompt, such as `inputs_embeds`,
                `past_key_values`, `use_cache=False`, `cache_implementation` and `assistant_model`; for a prompt at
                `"message"` without `prompt_position`; and for lengths beyond positions that the base looks up.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not self.enabled and not _names_rows_of_the_base(self, kwargs.get("adapter_names")):
            _check_names(self, kwargs.pop("adapter_names", None), input_ids)
            kwargs.pop("prompt_position", None)
            return generate_disabled(self, input_ids, *args, **kwargs)
        return generate_prompted(self, input_ids, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base, as in PEFT, but for methods that would generate without the prompt, or merge it."""
        if name in METHODS_OF_THE_BASE and self.enabled:
            raise AttributeError(f"{name} would run the base without the soft prompt; use generate.")
        if name in METHODS_OF_WEIGHTS:
            raise AttributeError(
                f"a soft prompt is no change of weights, so there is no {name}. spul.serving.export_checkpoint writes "
                "an ordinary model with the prompt in it, spul.combine makes one prompt of several, and "
                "get_base_model() is the base without one."
            )
        return super().__getattr__(name)

    # ---- loading ----

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module | str | os.PathLike,
        adapter: str | os.PathLike,
        is_trainable: bool = False,
        loss: UnlearningLoss | None = None,
        adapter_name: str = "default",
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SoftPromptUnlearner:
        """Load a saved prompt onto its base.

        Args:
            model: the base, or its name or folder, which is then loaded with `AutoModelForCausalLM`.
            adapter: folder or Hub name of the adapter; plain PEFT adapters of the four kinds load too.
            is_trainable: whether to train it further; P-tuning then needs the encoder that `save_pretrained` wrote.
            loss: the loss of further training; the saved one unless given.
            adapter_name: PEFT's name of the adapter.
            model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` when `model` is a name.
            kwargs: Hub arguments, such as `revision`, `token`, `cache_dir`, `subfolder`.

        Raises:
            TypeError: if the adapter is not one of the four prompt types.
            ValueError: if the prompt does not fit the base's width or layers, or cannot be trained on.

        Warns:
            UserWarning: if the base's weights are not those that the prompt was trained on.
        """
        return checkpoint.load(cls, model, adapter, is_trainable, loss, adapter_name, model_kwargs or {}, **kwargs)


def _names_rows_of_the_base(model: SoftPromptUnlearner, adapter_names: Any) -> bool:
    """Whether rows are named, and all prompts were deleted: rows of the base, batched as those beside prompts are."""
    return adapter_names is not None and not model.peft_config and not is_disabled_here(model)


def _check_names(model: SoftPromptUnlearner, adapter_names: Any, input_ids: Tensor | None) -> None:
    """Check `adapter_names` where the prompt is disabled, and every row is the base's."""
    if adapter_names is not None:
        check_adapter_names(model, adapter_names, 0 if input_ids is None else len(input_ids))
