"""Files of a reference: an index of what they belong to, and parts that are written once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.causal_lm import autocast_dtype
from ..records.digests import digest, fingerprint
from ..records.files import SCRATCH, atomic_write, write_text

logger = logging.getLogger(__name__)

FORMAT = 3
INDEX_NAME = "reference.json"
# Entries of a config that do not change what the model computes, or that have an entry of the index.
NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
NOT_COMPUTED |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def describe(base: Any, checksums: Tensor, layer: int | None = None) -> dict[str, Any]:
    """The index of a reference: the base, its precision, and the rows by their checksums, in any order.

    With the number of the decoder layer whose states are stored at all tokens, in place of final ones at responses.
    """
    weights = fingerprint(base)
    if weights is None:
        raise ValueError(
            "some weights of the base are not in memory (meta device or offloaded to disk), so that its reference "
            "cannot be distinguished from another base's; use reference='live'."
        )
    config = without_dropout(base.config.to_dict())
    autocast = autocast_dtype(base.device.type)
    return {
        "format": FORMAT,
        "base": weights,
        "config": digest({name: value for name, value in config.items() if name not in NOT_COMPUTED}),
        "precision": f"{str(base.dtype).removeprefix('torch.')}, autocast {autocast}",
        "data": digest(checksums.sort().values.tolist()),
        "rows": len(checksums),
        **({} if layer is None else {"layer": layer}),
    }


def without_dropout(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with every dropout 0, as prompts, layers and LoRA set it: of all of them the reference is one."""
    found = dict(config)
    for name, value in config.items():
        if isinstance(value, dict):  # of a part
            found[name] = without_dropout(value)
        elif isinstance(value, float) and "drop" in str(name):
            found[name] = 0.0
    return found


def _stored(layer: int | None) -> str:
    return "logits" if layer is None else f"the states of layer {layer}"


def claim_folder(folder: Path, index: dict[str, Any], accelerator: Accelerator | None = None) -> None:
    """Write the index into an empty folder (the main process does), or compare it with the existing one.

    Raises:
        ValueError: if the folder holds other files, or its index differs, naming each difference.
        PermissionError: if it cannot be written to.
    """
    if accelerator is None or accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in folder.iterdir() if not path.name.startswith(SCRATCH)]
            if others and INDEX_NAME not in others:
                raise ValueError(
                    f"{str(folder)!r} holds other files and no {INDEX_NAME}; name an empty or new folder."
                )
            if not others:
                write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{str(folder)!r} is not a folder; name one (reference_dir).") from error
        except PermissionError as error:
            raise PermissionError(
                f"the reference cannot be stored in {str(folder)!r}, which is not writable; name a folder that is "
                "(reference_dir), or use reference='live'."
            ) from error
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if not (folder / INDEX_NAME).exists():
        raise ValueError(f"{str(folder)!r} is not seen by all processes; name a folder that is.")
    try:
        there = dict(json.loads((folder / INDEX_NAME).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(folder / INDEX_NAME)!r} is damaged: {str(error).rstrip('.')}. Delete the folder, or name "
            "another (reference_dir)."
        ) from error
    differences = {
        "format": "it was written by another version of spul",
        "base": "its base has other weights",
        "config": "its base has another config",
        "precision": f"its base ran in another precision ({there.get('precision')}, now {index['precision']})",
        "data": f"its {there.get('rows')} rows are not the {index['rows']} of now, or were truncated or tokenized "
        "otherwise",
        "layer": f"it holds {_stored(there.get('layer'))}, where the loss reads {_stored(index.get('layer'))}",
    }
    if differs := [text for key, text in differences.items() if there.get(key) != index.get(key)]:
        raise ValueError(
            f"the reference in {str(folder)!r} does not belong to this run: {'; '.join(differs)}. "
            "Delete the folder, name another (reference_dir), or leave it out to have one for each base and data set."
        )


def write_part(path: Path, states: Tensor, rows: Tensor) -> None:
    """Write hidden states (tokens, d) and row checksums (rows,) atomically, with their own SHA-256 in the header."""
    tensors = {"states": states.contiguous(), "rows": rows.contiguous()}
    with atomic_write(path) as scratch:
        save_file(tensors, scratch, metadata={"sha256": _sha256(tensors)})


def read_part(path: Path, rows: Tensor, num_tokens: int) -> Tensor | None:
    """The memory-mapped states (num_tokens, d) of rows with these checksums; None if they are damaged, with a warning.

    Every byte is read once, for the checksum: of 200 MB some tenths of a second.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("states", "rows")}
            is_whole = (file.metadata() or {}).get("sha256") == _sha256(tensors)
        if is_whole and torch.equal(tensors["rows"], rows) and len(tensors["states"]) == num_tokens:
            return tensors["states"]
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read: %s", path, error)
    logger.warning("%s was cut off, was changed or holds other rows, and is computed again.", path)
    return None


def _sha256(tensors: dict[str, Tensor]) -> str:
    """Digest of contiguous tensors: their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
