"""Weights on disk: a safetensors file is checked by its header before its values are read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # a digest needs no torch, which is slow to import
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def weight_shapes(path: str | os.PathLike) -> Shapes:
    """Shape of each tensor of a safetensors file, from its header; the values are not read.

    Args:
        path: the file.

    Raises:
        ValueError: if it is not a whole safetensors file, or holds a tensor that is not floating point.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: part.get_dtype() for name, part in parts.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}), as after an interrupted copy; copy or download it again."
        ) from error
    for name, found in types.items():
        if found not in FLOATING:
            raise ValueError(
                f"{path}: {name!r} has the type {found}; expected floating point ({', '.join(FLOATING)}). Save the "
                "adapter again from the model that it was trained in."
            )
    return shapes


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: the file.

    Raises:
        ValueError: as `weight_shapes`, and if a value is NaN or infinite.
    """
    from safetensors.torch import load_file

    weight_shapes(path)
    tensors = load_file(path, device="cpu")
    for name, tensor in tensors.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(
                f"{path}: {bad} of {tensor.numel()} values of {name!r} are NaN or infinite; expected finite ones. "
                "Training has diverged, or the file is damaged: take an earlier checkpoint."
            )
    return tensors


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
