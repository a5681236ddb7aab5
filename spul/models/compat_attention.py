"""Attention functions of transformers, observed: a registry that its families read by name, private in parts."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "spul_observed_"
_here, _swap = threading.local(), threading.RLock()


class Attention(NamedTuple):
    """One call of a layer's attention.

    Attributes:
        layer: index of the layer.
        queries: (B, heads, n, width), rotated, times the scaling of the scores.
        keys: (B, key/value heads, columns, width), rotated; those of a cache come first.
        values: likewise.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor


@contextmanager
def observed_attention(base_model: nn.Module, observe: Callable[[Attention], None]) -> Iterator[None]:
    """Context manager: in forwards of this thread, each attention layer of the base is shown to a function.

    Families that compute attention in code of their own are not shown. One thread at a time observes. Inside,
    implementations other than `eager` and `sdpa` are replaced by `eager`, which computes the same.

    Args:
        base_model: a model of transformers.
        observe: called before each attention.
    """
    with _swap:
        before, outer = _implementations(base_model), getattr(_here, "observe", None)
        _here.observe = observe
        try:
            for config, name in before:
                config._attn_implementation = _observed(name or "eager")
            yield
        finally:
            _here.observe = outer
            for config, name in before:
                config._attn_implementation = name


def _implementations(base_model: nn.Module) -> list[tuple[Any, str | None]]:
    """Each config of the modules with its implementation, those of parts last: to set one sets its parts'."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in base_model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            waiting += [part for name in getattr(config, "sub_configs", ()) if (part := getattr(config, name, None))]
    return [(config, config._attn_implementation) for config in found.values()]


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of a layer's family, which stands beside its class."""
    for kind in type(module).__mro__:
        if (found := getattr(sys.modules[kind.__module__], "eager_attention_forward", None)) is not None:
            return found
    raise ValueError(f"{type(module).__name__} is of no family with an eager attention; load the base with 'sdpa'.")


@functools.cache
def _observed(name: str) -> str:
    """The name of an implementation that shows its calls and does what another does; registered at first use."""
    if name.startswith(_PREFIX):
        return name
    if name not in ("eager", "sdpa"):  # flash attention reads its own name from the config
        return _observed("eager")

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        attention = _eager_of(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        observe = getattr(_here, "observe", None)
        if observe is not None:
            scaling = kwargs.get("scaling")
            scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            observe(Attention(module.layer_idx, scaled, key, value))
        return attention(module, query, key, value, attention_mask, **kwargs)

    observed = _PREFIX + name
    ALL_ATTENTION_FUNCTIONS.register(observed, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(observed, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return observed
