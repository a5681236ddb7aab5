"""A causal LM of transformers: its logits at given positions, its base under adapters, modes, limits, checks."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .compat import (
    num_dims,
    peft_layers,
    remove_peft_layers,
    reset_compiled,
    takes_positions,
    uncompiled,
    without_peft_wrapper,
)
from .compat_checkpointing import switching
from .compat_modules import forward_hooks, modules_of_class, remove_hooks
from .noise import configs_of, dropout_of, restore_dropout

logger = logging.getLogger(__name__)

LINEAR = (nn.Linear, Conv1D)
"""The linear maps of transformers; GPT-2's stores its weight transposed."""

# Of each open block of `evaluation_mode`, in the order of entry.
_modes_before: list[dict[nn.Module, bool]] = []


# Linear layers by their class alone: these return more than a tensor, or of another shape, so that PEFT's LoRA, which
# takes them for linear, fails.
_NOT_LINEAR = ("PhimoeTopKRouter", "Llama4Router", "DeepseekV4GroupedLinear")

# Children of a decoder layer that are not its feed-forward, by parts of their names: norms, what mixes positions
# (attention, state spaces, convolutions, Griffin's recurrent block), Gemma's embeddings per layer, LAuReL and AltUp,
# hyper-connections, XLM's attention, and Zamba's block that layers share, with the map behind it.
_NOT_FEED_FORWARD = re.compile(
    r"norm|att|mamba|ssm|conv|mixer|temporal_block|per_layer|^ple$|laurel|altup|_hc$|^(q|k|v|out)_lin$|shared_transf"
    r"|^linear$"
)
# Linear maps within a feed-forward that choose or weight experts, or widen what routed ones write.
_NOT_END = re.compile(r"(^|[._])(gate|router)$|(^|\.)router\.|latent_proj$")


def not_linear(model: nn.Module) -> list[str]:
    """Names of the modules of a model that are linear layers by their class, and compute something else."""
    return [*modules_of_class(model, _NOT_LINEAR)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: the model is in evaluation mode; on exit every module's mode is restored.

    Blocks of several threads may overlap: the one that is left last restores the mode before all of them.
    """
    check_model(model)
    with switching:
        modes = {module: module.training for module in model.modules()}
        _modes_before.append(modes)
        model.eval()
    try:
        yield
    finally:
        with switching:
            _restore_modes(modes)


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    """Restore the modes before a block of `evaluation_mode`; a block entered later, and open, does it in its place."""
    place = next(i for i, one in enumerate(_modes_before) if one is modes)
    later = _modes_before[place + 1 :]
    del _modes_before[place]
    for module, mode in modes.items():
        heir = next((one for one in later if module in one), None)
        if heir is None:
            module.training = mode
        else:
            heir[module] = mode


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Context manager: if the block raises, a model's configs, dropout, modes and parameters are as before.

    Of parameters: `requires_grad`, and types of fewer bits, which PEFT's preparation of quantized models widens.
    """
    configs, dropout = configs_of(model), dropout_of(model)
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.dtype) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, config in configs:
            cast(Any, module).config = config
        restore_dropout(dropout)
        for module, mode in modes:
            module.training = mode
        for parameter, required, dtype in parameters:
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)
        raise


@contextmanager
def bare_on_error(model: nn.Module) -> Iterator[None]:
    """Context manager: if the block raises, a model without an adapter has none, nor hooks that were added."""
    hooks = {number for number, _ in forward_hooks(model)}
    try:
        yield
    except BaseException:
        remove_peft_layers(model)
        remove_hooks(model, hooks)
        raise


def check_bare(model: Any, kind: type[nn.Module] = PreTrainedModel) -> None:
    """Raise unless a model that is to be a base is a causal LM without an adapter around it or inside.

    Args:
        model: any object.
        kind: the class of models that are accepted.

    Raises:
        TypeError: if it is another object, or has an adapter.
    """
    if isinstance(model, PeftModel) or not isinstance(model, kind):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a causal LM, as AutoModelForCausalLM.from_pretrained gives "
            "it. An adapter of PEFT is merged first (model.merge_and_unload()), unlearning layers are removed "
            "(layers.remove())."
        )
    if found := peft_layers(model):
        raise TypeError(
            f"{type(model).__name__} has an adapter's layers inside, such as {found[0]!r}; expected a base without "
            "them, since fingerprint and saved files would not know of them. Merge them first: "
            "model = peft_model.merge_and_unload() of the PeftModel, or of PeftModel.from_pretrained(base, adapter)."
        )


def has_layers(model: nn.Module) -> bool:
    """Whether unlearning layers are attached to a model, also while they are disabled."""
    return any(getattr(hook, "is_unlearning_layer", False) for _, hook in forward_hooks(model))


def check_no_layers(model: nn.Module) -> None:
    """Raise if unlearning layers are attached to a model that is to be a base.

    Raises:
        TypeError: if they are, also while they are disabled.
    """
    if has_layers(model):
        raise TypeError(
            f"{type(model).__name__} has unlearning layers attached; expected a base without them, since fingerprint "
            "and saved files would not know of them, and removing them later would change the base. Remove them "
            "first: base = layers.remove()."
        )


def max_positions(base_model: Any) -> int | None:
    """The largest number of positions that the base supports; None if its config does not say."""
    config = base_model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if limit is None or limit > 0 else None  # XLNet has -1: none


def fails_beyond_positions(base_model: nn.Module) -> bool:
    """Whether a base fails beyond `max_positions`: it looks them up in a table, learned (GPT-2, OPT) or not (GPT-J).

    Others compute positions, and run on; the table of XGLM (`weights`) grows.
    """
    limit = max_positions(base_model)
    tables = chain(base_model.named_parameters(), base_model.named_buffers())
    return limit is not None and any(
        re.search(r"wpe|position", name) and not name.endswith(".weights") and 0 <= tensor.shape[0] - limit <= 2
        for name, tensor in tables
        if tensor.dim() == 2  # with up to two rows more, for pads (OPT)
    )


def counts_by_mask(base_model: nn.Module) -> bool:
    """Whether a base's table of positions takes the mask, so that pads have none (OPT, BioGPT)."""
    found = (module.forward for name, module in base_model.named_modules() if "position" in name)
    return any("attention_mask" in inspect.signature(forward).parameters for forward in found)


def cache_switch(base_model: Any) -> tuple[int | None, bool]:
    """The number of positions beyond which a base may drop its cache (Phi-3), and whether its rotary factors change.

    With longrope, keys cached below it are not those of a longer sequence. (None, False) for other families.
    """
    config = base_model.config.get_text_config()
    own = getattr(config, "original_max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type", one.get("type")) == "dynamic":
            return config.max_position_embeddings, True
        if one.get("rope_type", one.get("type")) == "longrope":
            return own or one.get("original_max_position_embeddings") or config.max_position_embeddings, True
    return own, False


def check_model(model: Any, name: str = "model") -> None:
    """Raise unless an argument is a model in memory.

    Args:
        model: any object.
        name: the argument's name, for the message.

    Raises:
        TypeError: if it is no module, such as the name of a folder.
    """
    if isinstance(model, nn.Module):
        return
    remedy = "AutoModelForCausalLM.from_pretrained(...)"
    if isinstance(model, (str, os.PathLike)):
        where = str(model)
        remedy = (
            f"a saved prompt is loaded by SoftPromptUnlearner.from_pretrained(base, {where!r}), a whole model by "
            f"AutoModelForCausalLM.from_pretrained({where!r})"
        )
    raise TypeError(f"{name} is a {type(model).__name__}, {model!r:.80}; expected a model in memory: {remedy}.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and DDP.

    Raises:
        TypeError: if it is no module.
    """
    check_model(model)
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else uncompiled(model)
        if inner is model:
            return model
        model = inner


def bare_model(model: nn.Module) -> nn.Module:
    """The causal LM of transformers inside wrappers and adapters."""
    model = unwrapped(model)
    return unwrapped(cast(Any, model).get_base_model()) if hasattr(model, "get_base_model") else model


def num_embeddings(model: nn.Module) -> int | None:
    """Number of the base's input embeddings, also under LoRA; None where they are of an unknown kind."""
    base: Any = bare_model(model)
    return getattr(without_peft_wrapper(base.get_input_embeddings()), "num_embeddings", None)


def selects_positions(model: nn.Module) -> bool:
    """Whether the model can compute logits at given (B, K) positions only."""
    return takes_positions(type(bare_model(model)))  # type: ignore[arg-type]


def logits_at(model: nn.Module, positions: Tensor, **inputs: Any) -> Tensor:
    """Logits (B, K, V) of a causal LM at `positions` (B, K) of its input; no others where the family supports that.

    The model may be wrapped, or under an adapter that adds no tokens, such as LoRA.
    """
    if selects_positions(model):
        return model(**inputs, logits_to_keep=positions).logits
    logits = model(**inputs).logits
    return logits.take_along_dim(positions[..., None], dim=1)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a causal LM's text decoder, in their order.

    Raises:
        ValueError: if it has no list of as many as its config says.
    """
    base: Any = bare_model(model)
    num_layers = base.config.get_text_config().num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(base).__name__} has no list of {num_layers} layers, whose hidden states could be read.")


def check_layer(model: nn.Module, layer: int) -> nn.Module:
    """A decoder layer of a causal LM, numbered from 0.

    Raises:
        ValueError: if there is no such layer.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer}: {type(bare_model(model)).__name__} has {len(layers)} layers, from 0.")
    return layers[layer]


def feed_forward_ends(model: nn.Module, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The last linear map of some decoder layers' feed-forward, such as `down_proj`, by its name in the model.

    It has the width of the hidden states, which it writes. Routers and gates are none, nor are routed experts, whose
    weights are in one parameter of three dimensions. Of attention, Mamba and the like it is only where a layer has
    nothing else, as in Mamba and NemotronH.

    Raises:
        ValueError: if a layer does not exist, or its feed-forward has no such map.
    """
    return dict(_feed_forward_end(model, layer) for layer in layers)


def _feed_forward_end(model: nn.Module, layer: int) -> tuple[str, nn.Module]:
    block = check_layer(model, layer)
    base: Any = bare_model(model)
    width, others = base.config.get_text_config().hidden_size, not_linear(model)
    start = next(name for name, module in model.named_modules() if module is block)
    linear = {
        inner: module
        for inner, module in block.named_modules()
        if isinstance(module, LINEAR) and f"{start}.{inner}" not in others
    }
    # Norms have vectors alone; some quantized weights are buffers.
    parts = [
        name
        for name, child in block.named_children()
        if any(num_dims(each) > 1 for each in (*child.parameters(), *child.buffers()))
    ]
    ends = [name for name in parts if len(parts) == 1 or not _NOT_FEED_FORWARD.search(name)]
    for inner, module in reversed(linear.items()):
        written = module.nf if isinstance(module, Conv1D) else module.out_features
        if written == width and inner.split(".")[0] in ends and not _NOT_END.search(inner):
            return f"{start}.{inner}", module
    is_routed = any("experts" in name for name, _ in block.named_parameters())
    raise ValueError(
        f"layer {layer} of {type(base).__name__} has no linear map that could be trained: expected one of its "
        f"feed-forward, which writes the {width} entries of its hidden states; found {', '.join(linear) or 'none'}."
        f"{' Routed experts are no linear maps.' if is_routed else ''} Train LoRA on weights of your choice: "
        "unlearning_method('RMU', 'lora').prepare(model, LoraConfig(...)), with target_modules"
        f"{', or target_parameters for experts' if is_routed else ''}."
    )


def states_at(model: nn.Module, layer: int, positions: Tensor, **inputs: Any) -> Tensor:
    """Hidden states (B, K, d) at `positions` (B, K), the output of a decoder layer, numbered from 0.

    The model may be wrapped, or under an adapter that adds no tokens, such as LoRA.

    Raises:
        ValueError: if there is no such layer.
    """
    block = check_layer(model, layer)
    found: list[Tensor] = []
    hook = block.register_forward_hook(
        lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    kept = {"logits_to_keep": 1} if selects_positions(model) else {}
    try:
        model(**inputs, **kept)
        if not found:  # a graph that was compiled without the hook
            reset_compiled()
            model(**inputs, **kept)
    finally:
        hook.remove()
    return found[0].take_along_dim(positions[..., None].to(found[0].device), dim=1)


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning, once for each message."""
    logger.warning(message)


def needs_gradient(model: nn.Module) -> bool:
    """Whether a forward would record a graph: gradients are enabled, and some parameter requires one."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
