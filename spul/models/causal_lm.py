"""A causal LM of transformers: its wrappers, modes, positions, logits and parameters."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers.modeling_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

logger = logging.getLogger(__name__)


def zero_dropout(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Set every dropout of a frozen model to 0: it would only make the two passes of one step disagree.

    Returns:
        What it was before, for `restore_dropout`.
    """
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            before.append((module, "p", module.p))
        # The functional ones: OPT's `dropout` and `layerdrop`, Llama's `attention_dropout`, ...
        before += [(module, name, p) for name, p in vars(module).items() if "drop" in name and isinstance(p, float)]
    restore_dropout([(module, name, 0.0) for module, name, _ in before])
    return before


def restore_dropout(values: list[tuple[nn.Module, str, float]]) -> None:
    """Set dropouts as they were before `zero_dropout`."""
    for module, name, p in values:
        setattr(module, name, p)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; then every module is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def max_positions(base_model: Any) -> int | None:
    """How many positions the base can take, where its config says so."""
    config = base_model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` or DDP has wrapped it."""
    while True:
        if (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def bare_model(model: nn.Module) -> nn.Module:
    """The causal LM of transformers inside wrappers and adapters."""
    model = unwrapped(model)
    return unwrapped(cast(Any, model).get_base_model()) if hasattr(model, "get_base_model") else model


def selects_positions(model: nn.Module) -> bool:
    """Whether the model computes logits at given (B, K) positions only."""
    return _class_selects_positions(type(bare_model(model)))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=32)
def _class_selects_positions(model_class: type[nn.Module]) -> bool:
    return (
        hasattr(transformers.modeling_utils, "slice_logits_to_keep")
        and model_class.__module__.startswith("transformers.")
        and "logits_to_keep" in inspect.signature(model_class.forward).parameters
    )


def logits_at(model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """The logits of a causal LM at `positions` (B, K) of its input: (B, K, V), and no others where the family can.

    The model may be wrapped, or under an adapter that adds no tokens, such as LoRA.
    """
    if selects_positions(model):
        return model(**inputs, logits_to_keep=positions).logits
    logits = model(**inputs).logits
    return logits.take_along_dim(positions[..., None], dim=1)


def is_checkpointing(base_model: nn.Module) -> bool:
    """Whether gradient checkpointing is on and would drop a cache in this forward."""
    return base_model.training and any(getattr(m, "gradient_checkpointing", False) for m in base_model.modules())


@functools.lru_cache(maxsize=64)
def say_once(message: str) -> None:
    logger.warning(message)


def needs_gradient(model: nn.Module) -> bool:
    """Whether a forward would record a graph: gradients are on, and something asks for one."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


# What PEFT puts between a module and its parameters.
WRAPPERS = r"\.((base_layer|original_module|token_adapter)\.)+"


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by the names that they have without PEFT's adapters, and none of the adapters'."""
    adapters = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapters += [f"{name}.{layer}." for layer in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            adapters.append(f"{name}.modules_to_save.")
    prefixes = tuple(adapters)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            yield re.sub(WRAPPERS, ".", name), parameter


def load_base(model: Any, model_kwargs: dict[str, Any]) -> Any:
    """The base itself, or loaded by its name or folder.

    Raises:
        ValueError: if there are `model_kwargs` for a model that is loaded already.
    """
    if isinstance(model, (str, os.PathLike)):
        return AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
    if model_kwargs:
        raise ValueError("model_kwargs are for loading a base by name, but model is a model already.")
    return model
