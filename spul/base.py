"""What is done to a base model when a prompt is put before it, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PromptTuningConfig, PromptTuningInit
from torch import nn


def zero_dropout(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Set every dropout of a frozen model to 0: it would only make the two passes of one step disagree.

    Returns:
        What it was before, for `restore_dropout`.
    """
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            before.append((module, "p", module.p))
        # The functional ones: OPT's `dropout` and `layerdrop`, Llama's `attention_dropout`, ...
        before += [(module, name, p) for name, p in vars(module).items() if "drop" in name and isinstance(p, float)]
    restore_dropout([(module, name, 0.0) for module, name, _ in before])
    return before


def restore_dropout(values: list[tuple[nn.Module, str, float]]) -> None:
    """Set dropouts as they were before `zero_dropout`."""
    for module, name, p in values:
        setattr(module, name, p)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; then every module is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
            if state.absmax.ndim == 2:  # left transposed, and rounded to bfloat16, unless doubly quantised
                state.absmax = state.absmax.T.reshape(-1).float()
        layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def scale_random_prompt(model: Any, adapter_name: str) -> None:
    """Bring prompt tuning's random rows to the mean and spread of the vocabulary's embeddings.

    PEFT draws them with a standard deviation of 1, where a vocabulary has about 0.02.
    """
    config = model.peft_config[adapter_name]
    if isinstance(config, PromptTuningConfig) and config.prompt_tuning_init == PromptTuningInit.RANDOM:
        vocabulary = model.word_embeddings.weight
        some = torch.arange(0, len(vocabulary), max(1, len(vocabulary) // 4096), device=vocabulary.device)
        looked_up = model.word_embeddings(some).float()  # through the module: Gemma scales what it looks up
        model.prompt_encoder[adapter_name].embedding.weight.mul_(looked_up.std()).add_(looked_up.mean())


def max_positions(base_model: Any) -> int | None:
    """How many positions the base can take, where its config says so."""
    config = base_model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)
