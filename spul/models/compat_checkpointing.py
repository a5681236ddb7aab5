"""Gradient checkpointing of transformers, all that spul uses of it: private, and different from version to version.

A layer under checkpointing drops the cache that its model passes it, since a layer that runs again in the backward
pass would fill it twice. Behind a shared prompt it has to keep it: see `kept_cache`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .compat_modules import all_modules, modules_with

# Names of the cache in the forwards of decoder layers.
_CACHES = ("past_key_values", "cache", "layer_past")
# Names of the number of their layer in modules of it; the second is GPT-Neo's.
_INDICES = ("layer_idx", "layer_id")
_FLAG = "gradient_checkpointing"
switching = threading.RLock()
"""Held by who changes the mode of a base or its checkpointing, and by forwards that depend on them: `unswitched`."""
# Modules whose checkpointing is off for a while, and will be on again; read and written together with their flags.
_off_for_now: set[nn.Module] = set()
_flags = threading.Lock()


def is_checkpointing(base_model: nn.Module) -> bool:
    """Whether gradient checkpointing is on and would drop a cache in this forward.

    transformers 5.23 renames the public property; the attribute that its modules read stays.
    """
    return base_model.training and any(m.gradient_checkpointing for m in modules_with(base_model, _FLAG))


def keeps_cache(base_model: nn.Module) -> bool:
    """Whether to ask a forward for the cache; under checkpointing it would warn, and set it to False."""
    return not (is_checkpointing(base_model) and torch.is_grad_enabled())


def is_reentrant(base_model: nn.Module) -> bool:
    """Whether gradient checkpointing is on and recomputes layers by the reentrant kind of torch."""
    on = [m._gradient_checkpointing_func for m in modules_with(base_model, _FLAG) if m.gradient_checkpointing]
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in on)


def switch_checkpointing(base_model: Any, switch: Literal["enable", "disable"], *args: Any, **kwargs: Any) -> None:
    """Enable or disable gradient checkpointing; transformers 5.23 renames the method to activation checkpointing."""
    old, new = (f"{kind}_checkpointing_{switch}" for kind in ("gradient", "activation"))
    getattr(base_model, new if hasattr(base_model, new) else old)(*args, **kwargs)


@contextmanager
def unswitched(base_model: nn.Module) -> Iterator[None]:
    """Context manager: of a base with gradient checkpointing switched on, no other thread changes mode or layers.

    Each layer asks for the mode by itself, and drops its cache by it; a mode that changed between two layers, or
    between a probe's answer and the forward that relies on it, would lose a prompt. Without checkpointing the mode of
    a frozen base matters to nothing, and no thread waits. While another thread has switched it off for a while, it
    counts as on: it would come on again between two layers.
    """
    with _flags:
        is_on = any(m.gradient_checkpointing or m in _off_for_now for m in modules_with(base_model, _FLAG))
    if not is_on:
        yield
        return
    with switching:
        yield


@contextmanager
def without_checkpointing(base_model: nn.Module) -> Iterator[None]:
    """Context manager: gradient checkpointing is off; on exit it is on again where it was."""
    with switching:
        modules = [m for m in modules_with(base_model, _FLAG) if m.gradient_checkpointing]
        _switch(modules, False)
        try:
            yield
        finally:
            _switch(modules, True)


def _switch(modules: list[Any], on: bool) -> None:
    with _flags:
        (_off_for_now.difference_update if on else _off_for_now.update)(modules)
        for module in modules:
            module.gradient_checkpointing = on


class _Prompts(NamedTuple):
    """Prompts in a layer of a cache: their keys and values, those of the rows, and how one becomes the other."""

    own: tuple[Tensor, Tensor]  # (prompts, heads, p, head width) each
    of_rows: tuple[Tensor, Tensor]
    spread: Callable[[Tensor], Tensor]


def put_prompts(layer: Any, keys: Tensor, values: Tensor, num_rows: int, index: Tensor | None = None) -> None:
    """Put prompts into a layer of a cache, so that each of `num_rows` rows has one.

    A checkpoint of the layer takes the prompts and spreads them over rows inside. Autograd runs what was made last
    first: if they were spread before all layers, the gradients of all rows, of each layer, would wait for the last.

    Args:
        layer: of a cache.
        keys: (prompts, heads, p, head width); views of it are put where there is one prompt.
        values: likewise.
        num_rows: number of rows.
        index: (rows,), for each its prompt; needed where there are several.
    """

    def spread(prompts: Tensor) -> Tensor:
        return prompts.expand(num_rows, -1, -1, -1) if index is None else prompts[index.to(prompts.device)]

    layer.keys, layer.values = spread(keys), spread(values)
    if keys.requires_grad:
        layer.prompts = _Prompts((keys, values), (layer.keys, layer.values), spread)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _prompts_of(layer: Any) -> _Prompts | None:
    """The prompts that were put into a layer, if nobody has changed it since."""
    found = getattr(layer, "prompts", None)
    unchanged = found is not None and found.of_rows[0] is layer.keys and found.of_rows[1] is layer.values
    return found if unchanged else None


@contextmanager
def kept_cache(base_model: nn.Module, cache: DynamicCache) -> Iterator[None]:
    """Context manager: in a forward with this cache, layers under gradient checkpointing keep it; others always do.

    The keys and values that the cache holds for a layer are inputs of the layer's checkpoint, so that the recomputed
    layer receives the same tensors and gradients flow to them, reentrant or not. What a layer puts into an empty cache
    is an output of its checkpoint. A layer that runs again works on a copy: nothing is cached twice.

    The layers are changed for the calling thread; a forward of another one waits, or runs as without this.
    """
    layers: list[Any] = [
        m
        for m in all_modules(base_model)
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing and m.training
    ]
    if not layers:
        yield
        return
    with switching:
        before = [(layer._gradient_checkpointing_func, layer._can_checkpoint_with_cache) for layer in layers]
        try:
            hollow = [_hollow(one) for one in cache.layers]
            for layer in layers:
                if (keep := _keeping(layer, cache, hollow)) is not None:
                    layer._gradient_checkpointing_func = keep
                    layer._can_checkpoint_with_cache = True  # else it warns that it drops the cache
            yield
        finally:
            for layer, (function, keeps) in zip(layers, before, strict=True):
                layer._gradient_checkpointing_func = function
                vars(layer).pop("_can_checkpoint_with_cache", None)
                if layer._can_checkpoint_with_cache is not keeps:
                    layer._can_checkpoint_with_cache = keeps


def _hollow(layer: Any) -> Any:
    """A layer of a cache whose keys and values have their shape, no memory, and no numbers."""
    found = copy.copy(layer)
    vars(found).pop("prompts", None)
    if found.is_initialized:
        found.keys, found.values = (
            t.detach().new_full((), torch.nan).expand(t.shape) for t in (found.keys, found.values)
        )
    return found


def _keeping(layer: Any, cache: Any, hollow: list[Any]) -> Callable[..., Any] | None:
    """A layer's checkpoint function that keeps its part of a cache; None for a layer that takes no cache.

    transformers calls such a function with the layer's forward, keyword arguments bound, and the positional arguments.

    Args:
        layer: the decoder layer.
        cache: what it keeps a part of.
        hollow: the layers of the cache without what they hold. What a recomputation holds must not lead to what the
            forward caches: graph and tensors would be freed at the end of the backward pass, or never.
    """
    checkpoint, thread = layer._gradient_checkpointing_func, threading.get_ident()
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    name = next((one for one in _CACHES if one in names), None)
    indices = {getattr(m, own) for own in _INDICES for m in modules_with(layer, own)}
    indices = {index for index in indices if isinstance(index, int)}
    if name is None or len(indices) != 1 or max(indices) >= len(cache.layers):
        return None
    index = indices.pop()
    shell, mine = copy.copy(cache), cache.layers[index]
    shell.layers = hollow

    def keep(function: functools.partial, *inputs: Any) -> Any:
        if threading.get_ident() != thread or not isinstance(function, functools.partial):
            return checkpoint(function, *inputs)
        inputs = tuple(None if one is cache else one for one in inputs)
        bound = {key: value for key, value in function.keywords.items() if value is not cache}
        call = functools.partial(function.func, *function.args)
        states = (mine.keys, mine.values) if mine.is_initialized else ()
        is_filled, spread = bool(states), cast(Callable[[Tensor], Tensor], _unchanged)
        if (prompts := _prompts_of(mine)) is not None:
            states, spread = prompts.own, prompts.spread
        settings: dict[str, Any] = {}  # of the filled layer, such as its length

        def run(*tensors: Any) -> Any:
            own, view = copy.copy(hollow[index]), copy.copy(shell)
            positional, named = list(tensors), dict(bound)
            if is_filled:
                *positional, keys, values = tensors
                own.keys, own.values = spread(keys), spread(values)
            view.layers = [*hollow[:index], own, *hollow[index + 1 :]]
            if names.index(name) < len(positional):
                positional[names.index(name)] = view
            else:
                named[name] = view
            out = call(*positional, **named)
            if is_filled:
                return out
            settings.update(vars(own), keys=None, values=None)
            return *(out if isinstance(out, tuple) else (out,)), own.keys, own.values

        out = checkpoint(run, *inputs, *states) if torch.is_grad_enabled() else run(*inputs, *states)
        if is_filled:
            return out
        *out, keys, values = out
        filled = copy.copy(mine)
        vars(filled).update(settings, keys=keys, values=values)
        cache.layers[index] = filled
        return out[0] if len(out) == 1 else tuple(out)

    return keep
