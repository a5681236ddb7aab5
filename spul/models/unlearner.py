"""The unlearner that a model is, or one around a model of other libraries: bare, under LoRA or a prompt of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.batch import LogitsFunction
from .causal_lm import logits_at, not_linear, states_at, unwrapped
from .compat import adapter_enabled, own_parameters, peft_layers
from .protocol import Unlearner

PREFIX_TYPES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)  # prompts that are keys and values, not embeddings
PROMPT_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, *PREFIX_TYPES)

# LoRA's initializations that subtract the adapter's product from the base's weights; EVA's and others leave them.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_leaves_base(config: PeftConfig) -> None:
    """Raise if an adapter of this config rewrites weights of the base when it is made.

    Raises:
        ValueError: if LoRA's `init_lora_weights` does, such as `"pissa"`.
    """
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise ValueError(
            f"init_lora_weights={init!r} rewrites the base's weights, so that disabling the adapter does not give the "
            "base back, and no reference is left; use init_lora_weights=True, or one that leaves the weights: "
            "'gaussian', 'orthogonal', 'eva' or 'mica'."
        )


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
            with self.detached_base() as base:
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

    @contextmanager
    def detached_base(self) -> Iterator[Any]:
        self._check_leaves_base()
        with super().detached_base() as base:
            yield base

    def _check_leaves_base(self) -> None:
        for config in self.inner.peft_config.values():  # also where another adapter is active
            check_leaves_base(config)

    @property
    def enabled(self) -> bool:
        return adapter_enabled(self.inner)

    def check_trainable(self) -> None:
        self._check_leaves_base()
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


def detached_base(model: nn.Module) -> AbstractContextManager[Any]:
    """Context manager: the causal LM within a model, its adapter disabled, in evaluation mode; restored afterwards."""
    return unlearner_of(model).detached_base()
