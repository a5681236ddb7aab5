"""Attacks by someone with more than a keyboard: who trains, quantizes, or looks inside.

Each is to be run on a control too, a model that never saw the forget rows: what it gives up there, it never knew.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ...models.compat import keep_4bit_differentiable

# ---- quantization ----


def quantized(
    model: str | os.PathLike, bits: int, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in 8 bit (LLM.int8) or 4 bit (NF4) by bitsandbytes, which may round away what unlearning changed.

    The same prompt goes on top by `SoftPromptUnlearner.from_pretrained(quantized(folder, bits=4), prompt)`; where it
    warns of other weights, that is what is tried. Accuracy on forget rows is better low, and no higher than
    unquantized; the retrained model quantized tells what rounding itself does.

    Args:
        model: folder or Hub name; of an unlearned whole model, or of the base that prompt or layers belong to.
        bits: 8 or 4.
        dtype: of what is not quantized, and of the computing; 8 bit multiplies in float16 whatever it is.
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
    return loaded.eval()
