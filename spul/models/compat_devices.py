"""Private APIs of torch and accelerate about devices and the memory of tensors; others are in `compat`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# ---- devices ----


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first weight, or, where accelerate offloads it, the one that it is fetched to.

    An offloaded weight is on the meta device while it waits, where nothing is computed: inputs belong elsewhere.
    """
    for inner in module.modules():
        for parameter in inner._parameters.values():
            if parameter is not None:
                return (_fetched_to(inner) if parameter.is_meta else None) or parameter.device
    raise ValueError(f"{type(module).__name__} has no parameters, and so no device.")


def _fetched_to(module: nn.Module) -> torch.device | None:
    """The device that a hook of accelerate fetches a module's offloaded weights to; None without such a hook."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):  # several hooks, in one
        if getattr(one, "offload", False) and one.execution_device is not None:
            return torch.device(one.execution_device)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere, in the memory of the CPU or on disk, until a forward needs them."""
    return any(_fetched_to(inner) is not None for inner in module.modules())


# ---- memory ----


def fake_tensors() -> AbstractContextManager[Any]:
    """Context manager: tensors that are made inside have a shape and no values; torch has it for its compiler."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


class TensorMemory(TorchDispatchMode):
    """Context manager: the peak memory of the tensors that are made inside, by the sizes of their storages.

    Args:
        last: tensors of this size in the last dimension are counted apart.
        but: tensors that are not counted, nor views of them.

    Attributes:
        peak: the others, in bytes, when all together were most.
        peak_of_last: those, at that moment.
    """

    def __init__(self, last: int, but: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.last, self._now, self.peak, self.peak_of_last = last, [0, 0], 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in but)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                kind, size = int(tensor.ndim > 0 and tensor.shape[-1] == self.last), storage.nbytes()
                self._add(kind, size)
                weakref.finalize(storage, self._add, kind, -size)
        if sum(self._now) > self.peak + self.peak_of_last:
            self.peak, self.peak_of_last = self._now
        return out

    def _add(self, kind: int, size: int) -> None:
        self._now[kind] += size
