"""The file of a ledger: its last line, found from the end, and bytes that are on the disk or not in it."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

BLOCK = 4096  # bytes read at a time, from the end, to find the last line


def last_line(file: FileIO) -> tuple[bytes | None, bytes]:
    """The last whole line of a file, None without one, and what follows it; only the end is read."""
    position, size, tail = file.seek(0, os.SEEK_END), BLOCK, b""
    while position > 0 and tail.count(b"\n") < 2:
        start = max(0, position - size)
        file.seek(start)
        tail = _read(file, position - start) + tail
        position, size = start, 2 * size  # a file that is no ledger may have a line of gigabytes
    *lines, torn = tail.split(b"\n")
    return (lines[-1] if lines else None), torn


def _read(file: FileIO, size: int) -> bytes:
    found = b""
    while len(found) < size and (part := file.read(size - len(found))):
        found += part
    return found


def append_bytes(file: FileIO, text: bytes, end: int) -> None:
    """Write at the end and onto the disk; what cannot be written whole is taken back."""
    try:
        rest = memoryview(text)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:  # as of a full disk
        file.truncate(end)
        raise


def sync_folder(folder: Path) -> None:
    """Bring a new file's name onto the disk, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
