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

_here = threading.local()


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

    Families that compute attention in code of their own are not shown.

    Args:
        base_model: a model of transformers.
        observe: called before each attention.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in base_model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    _here.observe = observe
    try:
        for config, name in before:
            config._attn_implementation = _observed(name or "eager")
        yield
    finally:
        _here.observe = None
        for config, name in before:
            config._attn_implementation = name


@functools.cache
def _observed(name: str) -> str:
    """The name of an implementation that shows its calls and does what another does; registered at first use."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        family: Any = sys.modules[type(module).__module__]
        attention = family.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        observe = getattr(_here, "observe", None)
        if observe is not None:
            scaling = kwargs.get("scaling")
            scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            observe(Attention(module.layer_idx, scaled, key, value))
        return attention(module, query, key, value, attention_mask, **kwargs)

    observed = f"spul_observed_{name}"
    ALL_ATTENTION_FUNCTIONS.register(observed, attend)
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(observed, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return observed
