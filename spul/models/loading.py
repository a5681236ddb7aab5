"""Models of transformers by name or folder: type, bits, device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .compat import PartialState, say_kernels_once

DType = Literal["auto", "float32", "bfloat16", "float16"]
BITS = (8, 4)


def load_causal_lm(
    name: str | os.PathLike[str],
    dtype: DType = "auto",
    bits: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> Any:
    """Load a causal LM, in evaluation mode.

    Args:
        name: folder or Hub name.
        dtype: type of its weights; `"auto"` (default) that in which they are stored.
        bits: 8 or 4 to quantize the linear layers by bitsandbytes, which then compute in `dtype`, of `"auto"`
            bfloat16; None (default) for none.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code in the repository may run.
        device: where it runs; this process's device unless given.

    Raises:
        OSError: if there is no such model.
        ValueError: if `bits` is another number.
    """
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits={bits!r}; expected 8 or 4, or none.")
    device = PartialState().device if device is None else torch.device(device)
    own: dict[str, Any] = {"revision": revision} if revision is not None else {}
    if bits is not None:
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        own |= {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=compute
            ),
            "device_map": {"": device},
        }
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _named(name, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted, trust_remote_code=trust_remote_code, **own
        ).eval()
    say_kernels_once(model)
    return model if bits is not None else model.to(device)


def load_base(model: Any, model_kwargs: dict[str, Any]) -> Any:
    """Return the base model, loaded with `AutoModelForCausalLM` if it is given by name or folder.

    Raises:
        ValueError: if `model_kwargs` are given for a model that is loaded already.
    """
    if isinstance(model, (str, os.PathLike)):
        return AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
    if model_kwargs:
        raise ValueError("model_kwargs are for loading a base by name, but model is a model already.")
    return model


def load_tokenizer(name: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """Load a tokenizer.

    Args:
        name: folder or Hub name.
        trust_remote_code: whether code in the repository may run.

    Raises:
        OSError: if there is no such tokenizer.
    """
    with _named(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


@contextmanager
def _named(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Context manager: errors name the folder, and say of a name that it is none, where the Hub's do not."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"the {what} in {str(name)!r} cannot be loaded: {error}") from error
        if not isinstance(error, HFValidationError | OSError):
            raise
        raise OSError(f"{str(name)!r} is no folder here, and the Hub gave no {what} of this name: {error}") from error
