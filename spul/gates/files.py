"""The files of a saved gate: `gate.json` and `gate.safetensors`, both checked when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..data.checks import fault_of_text
from ..records.fields import is_finite_number, read_object
from ..records.files import find_file, write_text
from ..records.saved import Saved
from ..records.weights import Shapes, file_digest, read_weights, weight_shapes

FORMAT_VERSION = 1
SETTINGS_NAME, ARRAYS_NAME = "gate.json", "gate.safetensors"


def write_gate(folder: str | os.PathLike, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a gate's files to an existing folder.

    Args:
        folder: the folder, such as the scratch one of `atomic_folder`.
        fields: fields for `gate.json`, which also gets the format version and the digest of the arrays' file.
        arrays: floating-point arrays by name; without any there is no file of them.
    """
    folder = Path(folder)
    digest = None
    if arrays:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS_NAME)
        digest = file_digest(folder / ARRAYS_NAME)
    data = {"format_version": FORMAT_VERSION, **fields, "arrays_sha256": digest}
    write_text(folder / SETTINGS_NAME, json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False))


def gate_files(folder: str | os.PathLike, saved_digest: str | None = None) -> list[Path]:
    """The files of the gate in a folder and of those within it, each gate's `gate.json` after all else of it.

    A folder within is of the gate if its `gate.json` has the digest that was saved; others may be the user's.

    Args:
        folder: the folder.
        saved_digest: SHA-256 that its `gate.json` must have; None takes any.
    """
    path = Path(folder, SETTINGS_NAME)
    if not path.is_file() or (saved_digest is not None and file_digest(path) != saved_digest):
        return []
    try:
        within = read_object(path).get("gates_sha256")
    except ValueError:  # damaged: it names no others
        within = None
    digests = within if isinstance(within, list) else []
    found = [file for i, one in enumerate(digests) for file in gate_files(Path(folder, str(i)), str(one))]
    return [*found, Path(folder, ARRAYS_NAME), path]


def remove_files(files: Iterable[Path]) -> None:
    """Remove files, in their order, and the folders that this leaves empty."""
    for path in files:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            path.parent.rmdir()


class SavedGate(Saved):
    """A saved gate: its `gate.json`, and its arrays."""

    remedy = "Fit it again, or copy or download the whole folder again."

    def arrays(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """The arrays, float64, of the names and shapes expected.

        Raises:
            FileNotFoundError: if there is no file of them.
            ValueError: if names, shapes or types are others, a value is not finite, or the file is not the one
                that was saved with `gate.json`.
        """
        path = find_file(self.folder, ARRAYS_NAME, **self.hub)
        if path is None:
            raise FileNotFoundError(
                f"{self.folder} has {SETTINGS_NAME} but no {ARRAYS_NAME}; copy or download the whole folder again."
            )
        found = weight_shapes(path)
        if found != shapes:
            differing = sorted(name for name in found.keys() | shapes if found.get(name) != shapes.get(name))
            raise ValueError(
                f"{path} does not fit {SETTINGS_NAME}: {differing[0]!r} has the shape {found.get(differing[0])}, "
                f"expected {shapes.get(differing[0])} (None: no such array). Copy or download the whole folder again."
            )
        tensors = read_weights(path)
        if bad := [name for name, tensor in tensors.items() if str(tensor.dtype) != "torch.float64"]:
            raise ValueError(f"{path}: {bad[0]!r} is {tensors[bad[0]].dtype}; expected float64. Save the gate again.")
        if file_digest(path) != self.fields["arrays_sha256"]:
            raise ValueError(
                f"{path} is not the file that was saved with {SETTINGS_NAME} (arrays_sha256); copy or download the "
                "whole folder again."
            )
        return {name: tensor.numpy() for name, tensor in tensors.items()}


def read_gate(folder: str | os.PathLike, **hub: Any) -> SavedGate:
    """A saved gate's `gate.json`, checked as far as all kinds share it.

    Args:
        folder: a local folder or a Hub repository's name.
        hub: arguments of `find_file`.

    Raises:
        FileNotFoundError: if there is none.
        TypeError: if an argument is not one of the Hub's.
        ValueError: if it is not JSON, of a later format, or a field has another type.
    """
    saved = SavedGate.read(folder, SETTINGS_NAME, FORMAT_VERSION, "`spul gate fit` or Gate.save", hub)
    saved.check(
        {
            "threshold": (is_finite_number, "a finite number"),
            "report": (lambda value: value is None or isinstance(value, dict), "an object, or null"),
            "arrays_sha256": (lambda value: value is None or isinstance(value, str), "text, or null"),
        }
    )
    return saved


def is_texts(value: Any) -> bool:
    """Whether a value is a list of one or more different texts."""
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(each, str) and fault_of_text(each) is None for each in value)
        and (len(set(value)) == len(value))
    )
