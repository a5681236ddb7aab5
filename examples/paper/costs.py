"""Costs of a run: trained parameters, seconds, peak memory, forward passes."""

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
    """The cost of a run.

    Args:
        trainable_parameters: number of trained parameters.
        seconds: wall-clock time.
        peak_memory_bytes: peak memory over that in use at the beginning; None where it cannot be measured.
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
    """Context manager: measures the cost of what is done with a model, in this process.

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
    """Context manager: peak memory as `bytes`, over the `before` bytes in use at the beginning.

    On a GPU it is read from PyTorch's allocator, on a CPU from Linux's resident set; elsewhere `bytes` is None. On a
    CPU the C library returns its free heap before, except small pieces, so an exact value needs a fresh process.
    `MALLOC_MMAP_THRESHOLD_` in the environment makes it return larger blocks at once.

    Args:
        device: the device whose memory is measured.
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
            _give_back_heap()  # the free heap of earlier runs would not be counted
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident set
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
