"""The files of a reference: an index that says what they belong to, and parts that are written once and mapped."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..records.files import SCRATCH, atomic_write, remove_stale_scratch, write_text

logger = logging.getLogger(__name__)


FORMAT = 1
INDEX_NAME = "reference.json"


class Part(NamedTuple):
    """One file of states, memory-mapped."""

    states: Tensor  # (tokens, d)
    rows: Tensor  # (rows,) int64, the rows' keys
    ends: Tensor  # (rows,) int32, where each row's tokens end


def claim_folder(folder: Path, index: Mapping[str, Any]) -> None:
    """Write down what a folder is for, unless it says so already.

    Raises:
        ValueError: if it holds other files.
        OSError: if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_scratch(folder)
        if not (folder / INDEX_NAME).exists():
            if any(not path.name.startswith(SCRATCH) and path.name != INDEX_NAME for path in folder.iterdir()):
                raise ValueError(
                    f"{str(folder)!r} holds other files and no {INDEX_NAME}; name an empty or new folder."
                )
            write_text(folder / INDEX_NAME, json.dumps(dict(index), indent=2) + "\n")
    except PermissionError as error:
        raise PermissionError(
            f"the reference cannot be kept in {str(folder)!r}, which is not writable; name a folder that is "
            "(reference_dir), or use reference='live'."
        ) from error


def check_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise a ValueError that says what differs, unless the folder is for this index."""
    try:
        there = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{str(folder)!r} is not seen by all processes; name a folder that is.") from error
    names = {
        "format": "it was written by another version of spul",
        "base": "its base has other weights",
        "config": "its base has another config",
        "precision": f"its base ran in another precision ({there.get('precision')}, now {index['precision']})",
        "data": f"its {there.get('rows')} rows are not the {index['rows']} of now, or were cut or tokenized otherwise",
    }
    if differs := [text for name, text in names.items() if there.get(name) != index[name]]:
        raise ValueError(
            f"the reference in {str(folder)!r} does not belong to this run: {'; '.join(differs)}. Delete the folder, "
            "name another (reference_dir), or leave it out to have one for each base and data set."
        )


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"


def write_part(path: Path, part: Part) -> None:
    """Write a part, whole or not at all."""
    with atomic_write(path) as scratch:
        save_file(part._asdict(), scratch)


def read_part(path: Path, keys: Sequence[int]) -> Part | None:
    """A part of the rows with these keys; None if it is not there, or was not written to its end."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            part = Part(*(file.get_tensor(name) for name in Part._fields))
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read (%s) and is computed again.", path, error)
        return None
    if part.rows.tolist() != list(keys) or len(part.states) != int(part.ends[-1]):
        logger.warning("%s holds other rows than it should and is computed again.", path)
        return None
    return part
