"""A prompt as a folder: writing it whole or not at all, reading it back, restoring a live one."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")


@contextmanager
def moved_in_whole(target: Path) -> Iterator[Path]:
    """A scratch folder whose files are moved into `target` when all are written, each in one move."""
    target.mkdir(parents=True, exist_ok=True)
    # Inside the folder, so that moving is renaming even where the folder is a mount of its own.
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
        scratch = Path(folder)
        yield scratch
        for written in sorted(path for path in scratch.rglob("*") if path.is_file()):
            place = target / written.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, place)


def find_file(adapter: str | os.PathLike, name: str, **hub: Any) -> Path | None:
    """The path of one file of an adapter, local or on the Hub; None if the adapter lacks it."""
    local = Path(adapter, hub.get("subfolder") or "", name)
    if Path(adapter).is_dir():
        return local if local.is_file() else None
    try:
        return Path(hf_hub_download(str(adapter), name, **hub))
    except LocalEntryNotFoundError:
        raise  # the Hub could not be asked, which is not the same as the file not being there
    except EntryNotFoundError:
        return None


SCRATCH = ".scratch-"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file that takes the place of `path` in one move, so that no half-written one is ever there."""
    scratch = path.with_name(f"{SCRATCH}{uuid.uuid4().hex}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
