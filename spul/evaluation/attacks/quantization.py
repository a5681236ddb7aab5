"""Quantization: weights in 8 or 4 bit, which may undo unlearning.

Run it on a control too, a model that never saw the forget rows: its change is the effect of rounding alone.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ...models.compat import keep_4bit_differentiable, say_kernels_once


def quantized(
    model: str | os.PathLike, bits: int, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in 8 bit (LLM.int8) or 4 bit (NF4) by bitsandbytes, which may round off the changes of unlearning.

    Load the same prompt with `SoftPromptUnlearner.from_pretrained(quantized(folder, bits=4), prompt)`, whose
    warning about other weights is expected. Forget accuracy should be low, no higher than without quantization; the
    quantized retrained model shows the effect of rounding itself.

    Args:
        model: folder or Hub name of a fully fine-tuned unlearned model, or of the base of a prompt or layers.
        bits: 8 or 4.
        dtype: of unquantized weights and of computation; 8 bit multiplies in float16 in any case.
        kwargs: as `AutoModelForCausalLM.from_pretrained`, such as `device_map`, `revision`.

    Raises:
        ValueError: for other `bits`.

    Source: Zhang et al., *Catastrophic Failure of LLM Unlearning via Quantization*, https://arxiv.org/abs/2410.16454
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}; expected 8 or 4.")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=config, **kwargs)
    keep_4bit_differentiable(loaded)
    say_kernels_once(loaded)
    return loaded.eval()
