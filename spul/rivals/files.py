"""The files of a saved rival: `spul_rival.json`, and its gate in `gate/`; both checked when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..gates.files import SETTINGS_NAME as GATE_NAME
from ..gates.files import gate_files, remove_files
from ..gates.gate import Gate
from ..gates.gated_files import GATE_FOLDER, ROUTING_NAME, gate_of
from ..prompts.checkpoint import CONFIG_NAME as ADAPTER_NAME
from ..records.fields import Checks, is_sha256, read_object
from ..records.files import check_can_hold, find_file, write_text
from ..records.saved import Saved
from ..records.weights import file_digest

RIVAL_NAME, FORMAT_VERSION = "spul_rival.json", 1
GATE_DIGEST = "gate_sha256"  # field of the digest of the gate's file, which has that of its arrays
GATE_CHECK: Checks = {GATE_DIGEST: (is_sha256, "64 hexadecimal digits")}


def write_rival(folder: str | os.PathLike, kind: str, fields: Mapping[str, Any], gate: Gate | None) -> None:
    """Write `spul_rival.json`, and the gate, if there is one, to `gate/` beside it.

    Args:
        folder: the folder; created if missing.
        kind: the rival's name.
        fields: what it works by, as values of JSON.
        gate: its gate.

    Raises:
        FileExistsError: if the folder is a file, or holds an adapter.
        ValueError: if the gate is a plain function, which cannot be saved.
    """
    check_can_hold(folder)
    folder = Path(folder)
    if found := [name for name in (ROUTING_NAME, ADAPTER_NAME) if (folder / name).exists()]:
        raise FileExistsError(f"{str(folder)!r} holds an adapter ({found[0]}); name a folder of the {kind}'s own.")
    data: dict[str, Any] = {"format_version": FORMAT_VERSION, "kind": kind, **fields}
    json.dumps(data, allow_nan=False)  # raises before the gate is written
    if gate is None:
        remove_files(_gate_files_of_before(folder))
    else:
        gate.check_savable()
        gate.save(folder / GATE_FOLDER)
        data[GATE_DIGEST] = file_digest(folder / GATE_FOLDER / GATE_NAME)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RIVAL_NAME, json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _gate_files_of_before(folder: Path) -> list[Path]:
    """The files of the gate that the rival saved in a folder names; a gate that another put there is none."""
    try:
        saved_digest = read_object(folder / RIVAL_NAME).get(GATE_DIGEST)
    except (OSError, ValueError):  # no rival, or a damaged one
        return []
    return gate_files(folder / GATE_FOLDER, saved_digest) if isinstance(saved_digest, str) else []


class SavedRival(Saved):
    """A saved rival: its `spul_rival.json`, and its gate."""

    def gate(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Gate:
        """The gate that was saved with it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or another one.
        """
        gate = gate_of(self.folder, model, tokenizer, **self.hub)
        self.check_gate()
        return gate

    def check_gate(self) -> None:
        """Raise unless its gate is the one that was saved with it, as far as is seen without the base.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is another one.
        """
        found = find_file(self.folder, f"{GATE_FOLDER}/{GATE_NAME}", **self.hub)
        if found is None:
            raise FileNotFoundError(
                f"{self.folder!r} has no {GATE_FOLDER}/{GATE_NAME}, the gate of its {self.kind}; save both again."
            )
        if file_digest(found) != self.fields[GATE_DIGEST]:
            raise ValueError(
                f"the gate in {self.folder!r} is not the one that was saved with {RIVAL_NAME}; save both again."
            )


def read_rival(folder: str | os.PathLike, **hub: Any) -> SavedRival:
    """A saved rival's `spul_rival.json`, checked as far as all kinds share it.

    Args:
        folder: a local folder or a Hub repository's name.
        hub: arguments of `find_file`.

    Raises:
        FileNotFoundError: if there is none.
        TypeError: if an argument is not one of the Hub's.
        ValueError: if it is not JSON, of a later format, or names no kind.
    """
    return SavedRival.read(folder, RIVAL_NAME, FORMAT_VERSION, "save_pretrained of a rival", hub)
