"""Every use of a private or changing API of transformers, peft, accelerate, bitsandbytes and torch."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_length_grouped_indices as get_length_grouped_indices  # not public


def adapter_is_disabled(model: Any) -> bool:
    """Whether a PEFT model's adapter is disabled: PEFT marks prompts on the model, other adapters in their layers."""
    return bool(model._adapters_disabled) or any(
        getattr(module, "disable_adapters", False) is True for module in model.modules()
    )


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from repacking their weights on a CPU.

    In evaluation mode, some CPUs get a layout for inference (bitsandbytes 0.50) through which no gradient flows, not
    even in training mode afterwards: one evaluation, and the prompt would train on wrong gradients without an error.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        state = getattr(layer.weight, "quant_state", None)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            layer.weight.data, state = unpack(layer.weight.data, state)
            if state.absmax.ndim == 2:  # left transposed, and rounded to bfloat16, unless doubly quantized
                state.absmax = state.absmax.T.reshape(-1).float()
        layer.support_avx512bf16_for_cpu = False
