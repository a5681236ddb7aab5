"""What a run costs: trained parameters, seconds, peak memory, forward passes."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spul.models.causal_lm import bare_model


@dataclass
class Cost:
    """What a run cost.

    Args:
        trainable_parameters: how many numbers were trained.
        seconds: wall-clock time.
        peak_memory_bytes: at the peak, over what was in use at the beginning; None where it cannot be told.
        forward_passes: rows that went through the decoder, reference passes included; a shared prompt is one row.
        forward_tokens: tokens that did, padding and virtual tokens included.
    """

    trainable_parameters: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    forward_passes: int = 0
    forward_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Meter:
    """Measures what happens to a model within a `with` block, in this process.

    Args:
        model: a causal LM, bare, under PEFT or under a prompt.

    Example:
        ```python
        with Meter(unlearner) as meter:
            trainer.train()
        print(meter.cost)
        ```
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cost = model, Cost()

    def __enter__(self) -> Meter:
        base: Any = bare_model(self.model)
        self._hook = base.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)
        self._memory = PeakMemory(next(base.parameters()).device)
        self._memory.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._memory.__exit__()  # waits for the GPU
        self.cost.seconds = time.perf_counter() - self._start
        self._hook.remove()
        self.cost.peak_memory_bytes = self._memory.bytes
        # 4-bit weights are packed, but they do not train.
        self.cost.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _count(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        assert given is not None
        self.cost.forward_passes += given.shape[0]
        self.cost.forward_tokens += given.shape[0] * given.shape[1]


class PeakMemory:
    """`bytes` that a `with` block needs at its peak, over the `before` bytes in use when it began.

    On a GPU, PyTorch's allocator tells. On a CPU it is the resident set as Linux counts it; elsewhere `bytes` is None.
    The C library gives its free heap back before, but keeps pieces too small for that, so the process should be a
    fresh one for an exact number; `MALLOC_MMAP_THRESHOLD_` in the environment makes it give larger blocks back at
    once.

    Args:
        device: where the memory is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None
        self.before = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif Path("/proc/self/clear_refs").exists():
            gc.collect()
            _give_back_heap()  # what earlier runs left would be taken for nothing
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif Path("/proc/self/clear_refs").exists():
            self.bytes = self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _give_back_heap() -> None:
    """Have the C library return free memory to the system, where it is one that can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
