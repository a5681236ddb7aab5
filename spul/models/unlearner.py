"""The protocol of a model that unlearns, whatever trains: a soft prompt, unlearning layers, LoRA, or all weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.batch import LogitsFunction
from .causal_lm import evaluation_mode, logits_at, not_linear, states_at, unwrapped
from .compat import adapter_enabled, own_parameters, peft_layers

PREFIX_TYPES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)  # prompts that are keys and values, not embeddings
PROMPT_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, *PREFIX_TYPES)


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
        enabled: whether the adapter is in effect for this thread; always true without one.
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

    enabled: Any = True
    disabled_somewhere: bool = False
    has_adapter: bool = True
    takes_adapter_names: bool = False
    takes_prompt_position: bool = False
    computes_loss: bool = False
    has_own_checkpoint: bool = False
    can_be_sharded: bool = True
    pads_between: bool = False
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

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Context manager: the model is the base."""
        raise NotImplementedError

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
        with detached_base(self.called_model) as base:
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
        """Clear what was recorded of the parameters, after an optimizer step."""
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


class _Wrapped(Unlearner):
    """A model that is no unlearner by itself. It stays wrapped (DDP, `torch.compile`), so that its hooks run."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.inner = model, cast(Any, unwrapped(model))

    @property
    def called_model(self) -> nn.Module:
        return self.model

    def response_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return logits_at(self.model, positions, **inputs)

    def embedding_logits(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        return logits_at(self.model, positions, inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    def reads(self, layer: int | None) -> tuple[LogitsFunction, LogitsFunction]:
        if layer is None:
            return super().reads(None)

        def states(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            return states_at(self.model, layer, positions, **inputs)

        def base_states(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
            self._check_base_is_left()
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            with detached_base(self.called_model) as base:
                return states_at(base, layer, positions, **inputs)

        return states, base_states


class FullModel(_Wrapped):
    """A bare causal LM, which is fully fine-tuned."""

    has_adapter = False
    trains_base = True
    in_words = "the trained weights"

    def get_base_model(self) -> Any:
        return self.inner

    def disable_adapter(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check_trainable(self) -> None:
        if not isinstance(self.inner, PreTrainedModel):
            raise TypeError(
                f"model is a {type(self.inner).__name__}; expected a SoftPromptUnlearner or UnlearningLayers around "
                "it, or a causal LM of transformers, bare or under LoRA."
            )

    def unsaved_parameters(self) -> list[str]:
        return []

    def adapter_parameters(self) -> list[nn.Parameter]:
        return list(self.inner.parameters())

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        return {}

    def on_base(self, base: PreTrainedModel, folder: Path) -> Any:
        return base


class PeftAdapter(_Wrapped):
    """A causal LM under LoRA or another adapter of PEFT that adds no tokens."""

    @property
    def in_words(self) -> str:
        kinds = {self.inner.peft_config[name].peft_type for name in self.inner.active_adapters}
        return "LoRA" if kinds == {PeftType.LORA} else "the adapter"

    def get_base_model(self) -> Any:
        return unwrapped(self.inner.get_base_model())

    def disable_adapter(self) -> AbstractContextManager[Any]:
        return self.inner.disable_adapter()

    @property
    def enabled(self) -> bool:
        return adapter_enabled(self.inner)

    def check_trainable(self) -> None:
        base = self.get_base_model()
        wrapped = {f"{name}.base_layer": name for name in peft_layers(base)}
        if found := [wrapped[name] for name in not_linear(base) if name in wrapped]:
            last = found[0].rpartition(".")[2]
            raise ValueError(
                f"the adapter is on {found[0]!r}, which is no linear map, so that PEFT's forward fails there; leave "
                f"it out of the adapter's config: exclude_modules=[{last!r}]."
            )

    def unsaved_parameters(self) -> list[str]:
        saved = getattr(self.inner.active_peft_config, "bias", "none")
        beside = {f"{name}.bias" for name in peft_layers(self.get_base_model())}  # "lora_only": of wrapped layers
        return [
            name
            for name in super().unsaved_parameters()
            if not (name.endswith("bias") if saved == "all" else saved != "none" and name in beside)
        ]

    def adapter_parameters(self) -> list[nn.Parameter]:
        base = {id(parameter) for _, parameter in own_parameters(self.get_base_model())}
        others = tuple(f".{name}." for name in self.inner.peft_config if name not in self.inner.active_adapters)
        return [
            parameter
            for name, parameter in self.inner.named_parameters()
            if id(parameter) not in base and not any(other in name for other in others)
        ]

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        if not self.enabled:
            return {}
        return {name: self.inner.peft_config[name].to_dict() for name in self.inner.active_adapters}

    def why_not_moved(self) -> str:
        return "adapters of PEFT other than spul's prompts: merge them first (merge_and_unload)"

    def on_base(self, base: PreTrainedModel, folder: Path) -> Any:
        raise TypeError(self.why_not_moved())


class PeftPrompt(PeftAdapter):
    """A causal LM under a prompt of plain PEFT: measured as it is, never trained."""

    pads_between = True
    follows_embeddings = False
    in_words = "the prompt"

    def check_measurable(self) -> None:
        kind = PeftType(self.inner.active_peft_config.peft_type)
        if kind not in PROMPT_TYPES:
            raise TypeError(
                f"the model is under a prompt of PEFT of the type {kind.value}; expected one of "
                f"{', '.join(one.value for one in PROMPT_TYPES)}, best loaded by SoftPromptUnlearner.from_pretrained."
            )

    @property
    def virtual_tokens_in_use(self) -> int:
        return self.inner.active_peft_config.num_virtual_tokens if self.enabled else 0

    def response_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        # Virtual tokens stand in front and have logits too; a prefix has none.
        if self.inner.active_peft_config.peft_type not in PREFIX_TYPES:
            positions = positions + self.virtual_tokens_in_use
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits.take_along_dim(positions[..., None], dim=1)

    def embedding_logits(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        raise TypeError(
            "the model is under a prompt of PEFT, which cannot follow input embeddings here; load it by "
            "SoftPromptUnlearner.from_pretrained."
        )

    def check_trainable(self) -> None:
        raise TypeError("model is a prompt of plain PEFT; expected a SoftPromptUnlearner around the base instead.")


def unlearner_of(model: nn.Module) -> Unlearner:
    """The unlearner that a model is, or one that wraps it.

    Args:
        model: a `SoftPromptUnlearner`, `UnlearningLayers`, a model under an adapter of PEFT, or a bare causal LM; also
            wrapped by DDP or `torch.compile`.
    """
    inner: Any = unwrapped(model)
    if isinstance(inner, Unlearner):
        return inner
    if not isinstance(inner, PeftModel):
        return FullModel(model)
    return (PeftPrompt if inner.active_peft_config.is_prompt_learning else PeftAdapter)(model)


@contextmanager
def detached_base(model: nn.Module) -> Iterator[Any]:
    """Context manager: the causal LM within a model, its adapter disabled, in evaluation mode; restored afterwards."""
    unlearner, inner = unlearner_of(model), unwrapped(model)
    # PEFT makes all of an adapter trainable when it is enabled again.
    frozen = [parameter for parameter in inner.parameters() if not parameter.requires_grad]
    try:
        with evaluation_mode(inner), unlearner.disable_adapter():
            yield unlearner.get_base_model()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
