"""Disabled adapters: for one thread, and one asyncio task, alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class _Scope:
    """A block of `disable_adapter`; without a model once it is left, also in tasks that were started inside it."""

    def __init__(self, model: Any) -> None:
        self.model = model


# A thread, and an asyncio task, has its own value.
_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("spul_disabled", default=())
_lock = threading.Lock()
_num_scopes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@contextmanager
def disabled_here(model: Any) -> Iterator[None]:
    """Context manager: `is_disabled_here(model)`, in this thread and asyncio task and in tasks started inside.

    Args:
        model: an unlearner; its `disabled_somewhere` tells whether any thread is inside such a block.
    """
    scope = _Scope(model)
    _count_scopes(model, 1)
    _scopes.set((*_scopes.get(), scope))
    try:
        yield
    finally:
        scope.model = None
        _scopes.set(tuple(one for one in _scopes.get() if one.model is not None))
        _count_scopes(model, -1)


def _count_scopes(model: Any, change: int) -> None:
    with _lock:
        _num_scopes[model] = _num_scopes.get(model, 0) + change
        model.disabled_somewhere = _num_scopes[model] > 0


def is_disabled_here(model: Any) -> bool:
    """Whether this thread and asyncio task is inside `disabled_here(model)`.

    torch.compile guards the flag; it cannot trace the variable, which is read only where some thread disables.
    """
    return model.disabled_somewhere and any(scope.model is model for scope in _scopes.get())
