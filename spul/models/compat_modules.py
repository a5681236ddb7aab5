"""Hooks, settings and versions of tensors of a model's modules, read in one quick walk.

A forward behind a prompt reads it each time, so that no change goes unnoticed. `nn.Module.modules` walks by generators
within generators, and a miss of `getattr` on a module raises: on a deep base either takes milliseconds. The
dictionaries read here are private to torch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, each once, as `model.modules()` has them, but by level."""
    found, seen = [model], {model}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def with_evaluated(model: nn.Module, name: str) -> Any:
    """A view of a model in which one part is in evaluation mode, of the same tensors; other threads keep the mode."""
    if not any(module.training for module in all_modules(getattr(model, name))):
        return model
    view = copy.copy(model)
    view._modules = {**model._modules, name: _evaluated(getattr(model, name))}
    return view


def _evaluated(module: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view.training = False
    view._modules = {name: None if part is None else _evaluated(part) for name, part in module._modules.items()}
    return view


def modules_with(model: nn.Module, name: str) -> list[Any]:
    """The modules of a model that have an attribute of this name, of their own or of their class."""
    return [module for module in all_modules(model) if name in vars(module) or hasattr(type(module), name)]


def modules_of_class(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules of a model, by name, whose class or one of its base classes has one of these names."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(kind.__name__ in names for kind in type(module).__mro__)
    }


def forward_hooks(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Id and function of each hook before and after the forwards of a model's modules; torch has no public list."""
    for module in all_modules(model):
        yield from module._forward_pre_hooks.items()
        yield from module._forward_hooks.items()


def remove_hooks(model: nn.Module, kept: Collection[int]) -> None:
    """Remove hooks before and after the forwards of a model's modules.

    Args:
        model: the model.
        kept: ids, as of `forward_hooks`, of those that stay.
    """
    for module in all_modules(model):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for one in hooks.keys() - kept:
                del hooks[one]


def weight_versions(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Address and version of each parameter and buffer: they change when it is replaced, moved, or written to.

    Autograd's counter `_version` misses writes through `.data`; inference tensors have none.
    """
    held = (tensors for m in all_modules(model) for tensors in (m._parameters, m._buffers) if tensors)
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version)
        for tensors in held
        for t in tensors.values()
        if t is not None
    )


# What every module of torch has: its mode, which does not matter to a base without dropout, and containers of modules,
# tensors and hooks, which are compared in their own right.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Types whose values are compared as they are.
_PLAIN = frozenset({bool, int, float, str, type(None)})


def settings_of(model: nn.Module) -> tuple[Any, ...]:
    """Settings of a forward beside tensors: config, hooks, attributes of every module, a replaced `forward` too."""
    found: list[Any] = []
    for module in all_modules(model):
        found.append(id(module))
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if hooks:
                found += hooks
        found += [
            value if type(value) in _PLAIN else _setting(value, 1)
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE
        ]
    if (config := getattr(model, "config", None)) is not None:
        found.append(_setting(vars(config), 3))
    return tuple(found)


def _setting(value: Any, depth: int) -> Any:
    """A value to compare: by content down to a depth of containers, by identity below it."""
    kind = type(value)  # `isinstance` asks a config for its class, too, and a config's `__getattribute__` is slow
    if kind in _PLAIN:
        return value
    if depth and issubclass(kind, dict):
        return tuple((name, _setting(one, depth - 1)) for name, one in value.items())
    if depth and issubclass(kind, (list, tuple)):
        return tuple(_setting(one, depth - 1) for one in value)
    if depth > 1 and issubclass(kind, PreTrainedConfig):  # that of a part
        return _setting(vars(value), depth)
    return id(value)
