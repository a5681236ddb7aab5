"""Files of a saved folder: atomic writes, and lookup in a local folder or on the Hub."""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from .messages import listed

HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")
SCRATCH = ".spul-scratch-"  # prefix of files and folders that are still being written
STALE_SECONDS = 600  # a scratch file untouched for longer belongs to a process that was killed


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a scratch file that replaces `path` in one move when the block ends.

    A reader sees the old file or the new one. If the block raises or the process is killed, `path` is unchanged. The
    file's permissions are those of any new file (the umask's).

    Args:
        path: the file to write; its folder must exist.

    Yields:
        The path to write to, in the folder of `path`.
    """
    path = Path(path)
    remove_stale_scratch(path.parent)
    scratch = _scratch_in(path.parent)
    try:
        mode = _ordinary_mode(scratch)
        yield scratch
        scratch.chmod(mode)  # safetensors writes files that only their owner may read
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file (UTF-8) by `atomic_write`."""
    with atomic_write(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a scratch folder whose files are moved into `target`, each in one move, when the block ends.

    Permissions are those of any new file (the umask's). Other files of `target` are left alone. If the block raises,
    `target` is unchanged; a process killed during the moves leaves old and new files, each of them whole.

    Args:
        target: the folder; created if missing.

    Yields:
        The folder to write to, inside `target`.

    Raises:
        ValueError: if `target` is a file, or an empty path.
    """
    _check_path(target)
    target = Path(target)
    if target.is_file():
        raise ValueError(f"{str(target)!r} is a file; pass a folder.")
    target.mkdir(parents=True, exist_ok=True)
    remove_stale_scratch(target)
    scratch = _scratch_in(target)  # inside, since a move is a rename only within one mount
    scratch.mkdir()
    try:
        mode = _ordinary_mode(scratch / "mode")
        yield scratch
        for written in sorted(path for path in scratch.rglob("*") if path.is_file()):
            written.chmod(mode)
            destination = target / written.relative_to(scratch)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_can_hold(folder: str | os.PathLike) -> None:
    """Raise unless a folder, which need not be there, may be made and written to.

    Args:
        folder: its path.

    Raises:
        FileExistsError: if it, or what it would stand in, is a file, or a link to nothing.
        PermissionError: if that may not be written to.
        ValueError: if the path is empty.
    """
    _check_path(folder)
    path = Path(folder).absolute()
    nearest = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not nearest.is_dir():
        what = "a file" if nearest.exists() else "a link to nothing"
        raise FileExistsError(f"{str(nearest)!r} is {what}; expected a folder, or a path of which one can be made.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{str(nearest)!r} may not be written to; name another folder, or allow it.")


def check_new_folder(folder: str | os.PathLike) -> Path:
    """Raise unless a folder can be written as a whole.

    Args:
        folder: its path.

    Raises:
        FileExistsError: if it is a file, a folder with files in it or a mount point, or would stand in a file.
        PermissionError: if the folder that it stands in may not be written to.
        ValueError: if the path is empty.
    """
    _check_path(folder)
    target = Path(folder).resolve()  # also of "new/../folder"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "a folder with files in it" if target.is_dir() else "a file"
        raise FileExistsError(
            f"{str(folder)!r} is {what}; expected a new or empty folder, since it is written as a whole."
        )
    if os.path.ismount(target):
        raise FileExistsError(
            f"{str(folder)!r} is a mount point, which cannot be replaced as a whole; name a folder in it, such as "
            f"{str(Path(folder, 'spul'))!r}."
        )
    check_can_hold(target.parent)
    return Path(folder)


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a scratch folder beside `folder` that becomes it in one move when the block ends.

    If the block raises or the process is killed, `folder` is as before.

    Args:
        folder: a path that is not there, or an empty folder.

    Yields:
        The folder to write to.

    Raises:
        FileExistsError, PermissionError, ValueError: as `check_new_folder`.
    """
    target = check_new_folder(folder).resolve()  # a link, and ".", cannot be moved onto
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_scratch(target.parent)
    scratch = _scratch_in(target.parent)
    scratch.mkdir()
    mode = scratch.stat().st_mode & 0o666  # the umask's
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors writes files that only their owner may read
        os.replace(scratch, target)  # onto an empty folder, or none
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_is_file(path: str | os.PathLike) -> None:
    """Raise unless a file is there.

    Args:
        path: its path.

    Raises:
        FileNotFoundError: if there is none, or a folder; the message lists what is there.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; expected a file: it has {_listing(path)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; its folder has {_listing(path.parent)}.")


def remove_stale_scratch(folder: Path) -> None:
    """Remove scratch files and folders that a killed process left in a folder."""
    for path in folder.glob(SCRATCH + "*"):
        with suppress(OSError):  # its process has finished meanwhile, or it belongs to another user
            newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_path(folder: str | os.PathLike) -> None:
    """Raise for an empty path, which is the current folder to `Path`."""
    if not os.fspath(folder):
        raise ValueError("the path of the output folder is empty; expected one, such as 'out'.")


def _ordinary_mode(path: Path) -> int:
    """Permissions that a new file gets here; the umask itself can only be read by setting it, for all threads."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _scratch_in(folder: Path) -> Path:
    return folder / f"{SCRATCH}{uuid.uuid4().hex}"


def check_hub_arguments(hub: Mapping[str, Any]) -> None:
    """Raise unless all arguments are the Hub's.

    Raises:
        TypeError: if one is not.
    """
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise TypeError(f"unknown arguments {unknown}; expected the Hub's: {', '.join(HUB_ARGUMENTS)}.")


def find_file(folder: str | os.PathLike, name: str, **hub: Any) -> Path | None:
    """Path of one file of a saved folder, local or on the Hub.

    Args:
        folder: a local folder or a Hub repository's name.
        name: the file's name.
        hub: arguments of `hf_hub_download`, one of `HUB_ARGUMENTS`; locally only `subfolder` counts.

    Returns:
        The path; None if the folder lacks the file.

    Raises:
        LocalEntryNotFoundError: if the file is not cached and the Hub cannot be reached.
        FileNotFoundError: if `folder` is neither there nor a possible name on the Hub.
    """
    if Path(folder).is_dir():
        local = Path(folder, hub.get("subfolder") or "", name)
        return local if local.is_file() else None
    try:
        return Path(hf_hub_download(str(folder), name, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{str(folder)!r} is no folder here, and no name on the Hub (NAME or OWNER/NAME); expected the folder "
            "that save_pretrained wrote, or the name of a Hub repository."
        ) from error
    except LocalEntryNotFoundError as error:  # of EntryNotFoundError, but it does not mean that the file is missing
        raise LocalEntryNotFoundError(
            f"{str(folder)!r} is no folder here, its {name} is not cached, and the Hub could not be asked: {error}"
        ) from error
    except EntryNotFoundError:
        return None


def _listing(folder: Path, shown: int = 20) -> str:
    if not folder.is_dir():
        return "not been found either"
    names = sorted(path.name for path in folder.iterdir())
    return listed(names, shown) or "nothing in it"
