"""Unlearner: the protocol of a model that unlearns, whatever trains: a prompt, layers, LoRA, or all weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.batch import LogitsFunction
from .causal_lm import evaluation_mode, logits_at, unwrapped
from .compat import own_parameters
from .compat_devices import device_of
from .disabling import disabled_here, is_disabled_here


def drop_adapter_names(kwargs: dict[str, Any]) -> None:
    """Drop `adapter_names=None`; PEFT takes the argument for every adapter, and ignores it for prompts.

    Raises:
        ValueError: if adapters are named.
    """
    if (names := kwargs.pop("adapter_names", None)) is not None:
        raise ValueError(
            f"adapter_names={names!r}: a batch runs under one adapter; choose it by set_adapter, or disable it by "
            "disable_adapter, and leave out adapter_names."
        )


class Unlearner:
    """A causal LM with its trainable part. Other packages use this interface and never check the type.

    `SoftPromptUnlearner` and `UnlearningLayers` are unlearners; `unlearner_of` wraps any other model. The defaults are
    those of an adapter that adds no tokens.

    Attributes:
        disabled_somewhere: whether a thread or asyncio task is inside `disable_adapter`.
        has_adapter: whether disabling an adapter restores the base.
        takes_adapter_names: whether `response_logits` and `generate` take one name of a prompt per row.
        takes_prompt_position: whether `response_logits`, `embedding_logits` and `generate` take, and prompts at
            `"message"` need, the number of each row's tokens before its prompt.
        computes_loss: whether `forward` computes the unlearning loss of a batch with `is_forget`.
        has_own_checkpoint: whether `save_pretrained` and `load_checkpoint` replace those of `transformers.Trainer`.
        can_be_sharded: whether it trains under FSDP and DeepSpeed.
        pads_between: whether `generate` leaves pads between virtual tokens and left-padded rows, so that rows of a
            batch must have one length.
        hides_pads: whether `generate` keeps pads of left-padded rows from what penalizes or forbids tokens.
        follows_embeddings: whether `embedding_logits` works.
        reads_tokens: whether it reads the tokens of a request, which vectors in their place are not; its
            `response_logits` takes `labels`, too, by which a text without a request is told from a short one.
        is_gated: whether gates, which read a request's text, choose what it gets: a prompt, a refusal, or the base.
        is_trained: whether something of it was trained, which can be trained further.
        answers_fixed: whether some requests get a fixed text, whose tokens have probability 1 and all others 0.
        loss: its `UnlearningLoss`; None if the caller must pass one.
        multiplier: the `RetainMultiplier` of a loss of its own that has a budget; None otherwise.
        spul_config: the `SpulConfig` that is saved with it; None where there is none.
        in_words: what stands between the base and the model, for reports: `"the prompt"`.
    """

    disabled_somewhere: bool = False
    has_adapter: bool = True
    takes_adapter_names: bool = False
    takes_prompt_position: bool = False
    computes_loss: bool = False
    has_own_checkpoint: bool = False
    can_be_sharded: bool = True
    pads_between: bool = False
    hides_pads: bool = False
    follows_embeddings: bool = True
    reads_tokens: bool = False
    is_gated: bool = False
    is_trained: bool = True
    answers_fixed: bool = False
    loss: Any = None
    multiplier: Any = None
    spul_config: Any = None
    in_words: Any = "the adapter"

    # ---- the base and the adapter on it ----

    @property
    def called_model(self) -> nn.Module:
        """The model that is called."""
        return cast(nn.Module, self)

    def get_base_model(self) -> Any:
        """The causal LM without wrappers and adapters."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the base, where inputs belong."""
        return device_of(self.get_base_model())

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Context manager: for the calling thread or asyncio task the model is the base; named as in PEFT."""
        return disabled_here(self)

    @property
    def enabled(self) -> bool:
        """Whether the adapter is in effect for this thread and asyncio task; always true without one."""
        return not is_disabled_here(self)

    @contextmanager
    def detached_base(self) -> Iterator[Any]:
        """Context manager: the causal LM without the adapter, in evaluation mode; restored afterwards."""
        inner = unwrapped(self.called_model)
        # PEFT makes all of an adapter trainable when it is enabled again.
        frozen = [parameter for parameter in inner.parameters() if not parameter.requires_grad]
        try:
            with evaluation_mode(inner), self.disable_adapter():
                yield self.get_base_model()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def cached_prompts(self) -> AbstractContextManager[Any]:
        """Context manager: what does not depend on the input is computed once for all calls inside."""
        return nullcontext()

    @property
    def virtual_tokens_in_use(self) -> int:
        """Virtual tokens that the model sees in front of every row now."""
        return 0

    @property
    def longest_prompt(self) -> int:
        """Virtual tokens of the longest prompt that a row may have, where rows have prompts of their own."""
        return self.virtual_tokens_in_use

    @property
    def trains_base(self) -> bool:
        """Whether weights of the base itself train, so that disabling the adapter does not restore the base."""
        return any(parameter.requires_grad for _, parameter in own_parameters(self.get_base_model()))

    def unsaved_parameters(self) -> list[str]:
        """Names of the base's parameters that require gradients, although what is saved leaves them out."""
        return [name for name, parameter in own_parameters(self.get_base_model()) if parameter.requires_grad]

    # ---- logits ----

    def response_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of a right-padded batch (B, n), counted without virtual tokens."""
        raise NotImplementedError

    def base_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """The base's logits there, (B, K, V).

        Raises:
            ValueError: if the base trains, so that its logits before training are gone.
        """
        self._check_base_is_left()
        with self.detached_base() as base:
            return logits_at(base, positions, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def _check_base_is_left(self) -> None:
        if self.trains_base:
            raise ValueError(
                "the loss compares with the base before training, and its own weights train: pass reference_logits, "
                "from a ReferenceCache built before training."
            )

    def reads(self, layer: int | None) -> tuple[LogitsFunction, LogitsFunction]:
        """The functions that give a loss what it reads, of the trained model and of the base.

        Args:
            layer: its `reads_layer`: None for logits, the number of a decoder layer for its states.

        Raises:
            ValueError: if the model gives no states.
        """
        if layer is None:
            return self.response_logits, self.base_logits
        raise ValueError(
            f"the loss reads hidden states of layer {layer} (RMU), which {type(self).__name__} does not give; train "
            "all weights or LoRA: unlearning_method('RMU', 'full')."
        )

    def logits_through(self, wrapper: nn.Module) -> LogitsFunction:
        """`response_logits` by a call of this model's wrapper (DDP, `torch.compile`), so that its hooks run."""
        return self.response_logits

    def embedding_logits(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """`response_logits` from input embeddings (B, n, d)."""
        raise NotImplementedError

    def names_of(self, prompts: Sequence[Sequence[int]]) -> list[str] | None:
        """Names of the prompts that requests get, as token ids, `"__base__"` for none; None where no gate chooses."""
        return None

    # ---- training ----

    def check_trainable(self) -> None:
        """Raise unless the unlearning loss can train this model."""

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the active adapter; all of the model without one."""
        raise NotImplementedError

    def parameters_changed(self) -> None:
        """Clear what was recorded of the parameters: after an optimizer step, or a loss with gradients, before one."""
        if self.spul_config is not None:
            self.spul_config.metrics.clear()
            self.spul_config.weights_sha256 = None

    def load_checkpoint(self, folder: str) -> None:
        """Restore what `save_pretrained` wrote."""
        raise NotImplementedError

    # ---- evaluation ----

    def check_measurable(self) -> None:
        """Raise where the metrics cannot follow the adapter."""

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        """The configs of the adapters in effect, by name."""
        raise NotImplementedError

    def why_not_moved(self) -> str:
        """Why `on_base` is not possible; empty where it is."""
        return ""

    def on_base(self, base: PreTrainedModel, folder: Path) -> Any:
        """A copy for inference on another base, saved to and loaded from a folder."""
        raise NotImplementedError
