"""An append-only ledger of requests to forget: JSON lines in a chain of digests."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from .fields import is_count, is_sha256
from .ledger_events import FOLLOWING, RECOVERED, REOPENING, LedgerEntry, LedgerEvent, name_fault
from .ledger_file import append_bytes, last_line, sync_folder
from .ledger_lines import LedgerFault, chain, entry_of, next_line, remarks
from .ledger_states import RequestState, states_of
from .ledger_withdrawn import command, why_withdrawn
from .messages import warn

SECONDS = 60  # that a writer waits for another


class Ledger:
    """Append-only record of requests to forget: JSON lines, each with the digest of the line before and its own.

    An edited, missing or moved line breaks the chain, which `verify` finds. A missing end leaves a whole chain: note
    the `head` elsewhere, and `verify` against it. Whoever may write the file may write all of it anew, which also only
    a head noted elsewhere shows.

    An entry is on the disk when `append` returns. Several processes may write, each line under a lock (a file `.lock`
    beside the file itself, also where it is reached by a link). The part of a line that a killed writer left is moved
    to a file `.torn-...` beside by the next `append`, and an entry says so.

    Args:
        path: the file; made by the first `append`.

    Raises:
        FileNotFoundError: if the file's folder does not exist.
        ValueError: if the path is that of a folder or a device.

    Example:
        ```python
        ledger = Ledger("ledger.jsonl")
        ledger.append(LedgerEvent.of_adapter("trained", "2026-017", "forget-017"))
        assert not ledger.verify(head=noted)
        ```
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no file that keeps what is written"
            raise ValueError(f"{str(path)!r} is {what}; pass the path of a file, such as 'ledger.jsonl'.")
        self._check_folder()
        self._known: set[str] = set()  # names of requests that were found in the file, to which entries are only added
        self._newest: LedgerEntry | None = None  # the last that this object has found or written

    def append(self, event: LedgerEvent, revocations: int | None = None) -> LedgerEntry:
        """Write an event at the end of the chain.

        Args:
            event: the event; the entry's time is now.
            revocations: how often its request had been revoked (`revocations`) when the work began of which the event
                is. A request that is revoked by now, and was not as often then, gets no entry, which might make it
                one again. None (default) asks for nothing.

        Returns:
            The entry.

        Raises:
            FileNotFoundError: if the file's folder does not exist, or the file is gone in which requests were found.
            ValueError: if a field of the event is out of range, the event is `served`, `answered`, `stopped` or
                `revoked` of a request that no entry names, or `received` or `trained` of a new one by whose name no
                prompt can be served, the last line is no entry of a ledger, entries that this object has found or
                written are missing, or the request was revoked while the work was done.
            TimeoutError: if another writer holds the lock for a minute.

        Warns:
            UserWarning: if a killed writer left a part of a line.
        """
        if not isinstance(event, LedgerEvent):
            raise TypeError(f"event is a {type(event).__name__}; expected LedgerEvent(...).")
        if revocations is not None and not is_count(revocations):
            raise ValueError(f"revocations={revocations!r}; expected a number, as Ledger.revocations returns it.")
        fields = event.to_dict()
        self._check_folder()  # a lock would make it
        if event.request is not None:
            if event.event in FOLLOWING:
                self.check_known(event.request)
            elif event.event in REOPENING:
                self.check_name(event.request)
        with self._lock():
            self._check_not_gone()
            is_new = not self.path.exists()
            with self.path.open("a+b", buffering=0) as file:
                last, torn = last_line(file)
                previous, whole = self._last_entry(last), entry_of(torn)
                self._check_continues(whole or previous)
                if revocations is not None:
                    self._check_not_revoked_since(revocations, event)
                text, end = b"", file.seek(0, os.SEEK_END)
                if whole is not None:  # only its line break is missing
                    previous, text = whole, b"\n"
                elif torn:
                    note = self._moved_aside(torn)
                    end -= len(torn)
                    file.truncate(end)
                    previous, text = next_line(previous, note)
                entry, line = next_line(previous, fields)
                append_bytes(file, text + line, end)
            self._newest = entry
            if is_new:
                sync_folder(self._file.parent)
        return entry

    def check_goes_on(self) -> None:
        """Raise unless an entry can be appended, as far as is seen without one: call it before hours of work.

        Raises:
            FileNotFoundError, ValueError, TimeoutError: as `append`.
            PermissionError: if the file, or the lock beside it, may not be written.
        """
        self._check_folder()
        with self._lock():
            self._check_not_gone()
            if self.path.exists():
                with self.path.open("r+b", buffering=0) as file:
                    last, torn = last_line(file)
                    previous = self._last_entry(last)
                    self._check_continues(entry_of(torn) or previous)

    def entries(self) -> list[LedgerEntry]:
        """The entries, in order, without a half-written last line.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the chain is broken.
        """
        return list(self._read())

    def states(self) -> dict[str, RequestState]:
        """Each request as the entries leave it, by its name.

        Raises:
            FileNotFoundError, ValueError: as `entries`.
        """
        return states_of(self._read())

    def revocations(self, request: str) -> int:
        """Number of revocations of a request by now, for `append` to compare when the work that begins has ended.

        Args:
            request: its name, also one that no entry names.

        Raises:
            ValueError: if the chain is broken.
        """
        state = self.states().get(request) if self.path.exists() else None
        return 0 if state is None else len(state.revocations)

    def check_known(self, request: str) -> None:
        """Raise unless some entry names a request: one that is served or revoked under another name is a mistake.

        Args:
            request: its name.

        Raises:
            ValueError: if none does.
        """
        if self._knows(request):
            return
        near = difflib.get_close_matches(request, sorted(self._known), n=3)
        raise ValueError(
            f"the ledger {str(self.path)!r} knows no request {request!r}"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ".")
            + " Give the name of the request, which is also that of its prompt where it is served. A new request is "
            f"noted first: {command(self.path, 'received', request)}"
        )

    def check_name(self, request: str) -> None:
        """Raise unless a prompt can be served by the name of a new request, which it must be to be answered under it.

        A request that some entry names goes on by its name, whatever it is.

        Args:
            request: its name.

        Raises:
            ValueError: if none can.
        """
        fault = name_fault(request)
        if fault is not None and not self._knows(request):
            raise ValueError(
                f"request={request!r}: its name is that of its prompt where it is served, and {fault}. Give the "
                "request another name."
            )

    def _knows(self, request: str) -> bool:
        if request not in self._known:
            self._known |= self._requests()
        return request in self._known

    def _requests(self) -> set[str]:
        """Names of all requests; of a damaged ledger, those of the entries that are whole."""
        if not self.path.exists():
            return set()
        lines, torn = self._lines()
        found = [entry for entry in map(entry_of, [*lines, torn]) if entry is not None]
        if found and (self._newest is None or found[-1].sequence > self._newest.sequence):
            self._newest = found[-1]
        return {entry.request for entry in found if entry.request}

    def check_not_revoked(self, request: str, prompt_sha256: str | None = None, has_weights: bool = True) -> None:
        """Raise if a request was revoked, or its prompt has weights of one that was, also of one trained anew since.

        The same weights may stand for several requests, each of which the ledger then knows by them.

        Args:
            request: its name.
            prompt_sha256: SHA-256 of the prompt's weights; None if not known, which counts as earlier weights of a
                request that was revoked and trained anew, where entries name weights of it.
            has_weights: whether it has weights. A fixed refusal has none, so that there are no earlier ones of it.

        Raises:
            ValueError: if it was, or the chain is broken.
        """
        states = self.states() if self.path.exists() else {}
        reason = why_withdrawn(self.path, states, request, prompt_sha256, has_weights)
        if reason is not None:
            raise ValueError(reason)

    def head(self) -> str:
        """Digest of the last entry, to be noted elsewhere.

        Raises:
            FileNotFoundError, ValueError: as `entries`; also if there is no entry.
        """
        last = deque(self._read(), maxlen=1)
        if not last:
            raise ValueError(f"{str(self.path)!r} has no entry, and so no head.")
        return last[0].digest

    def verify(self, head: str | None = None) -> list[LedgerFault]:
        """Every line that breaks the chain.

        Args:
            head: a `head` noted earlier, which must be the digest of some entry.

        Returns:
            The faults, in the order of the lines; [] of a whole ledger.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if `head` is no digest.
        """
        if head is not None and not is_sha256(head):
            raise ValueError(f"head={head!r}; expected 64 hexadecimal digits, as Ledger.head returns them.")
        lines, torn = self._lines()
        faults = [one for one in chain(lines) if isinstance(one, LedgerFault)]
        if torn:
            reason = "a killed writer left it half-written; the next entry moves it aside"
            if entry_of(torn) is not None:
                reason = "it lacks its line break, as of a killed writer; the next entry completes it"
            faults.append(LedgerFault(len(lines) + 1, reason))
        if head is not None and head not in {entry.digest for entry in map(entry_of, lines) if entry is not None}:
            faults.append(
                LedgerFault(0, f"no entry has the digest {head}: the end is missing, or the chain was written anew")
            )
        return faults

    def remarks(self) -> list[LedgerFault]:
        """Remarks on lines that break nothing: half lines that were moved aside, times before the line before's.

        Raises:
            FileNotFoundError, ValueError: as `entries`.
        """
        return list(remarks(self._read()))

    def _check_not_revoked_since(self, revocations: int, event: LedgerEvent) -> None:
        """Raise if the request of an event is revoked, and was not as often before; within the lock of a writer."""
        lines, torn = self._split()
        whole = [*lines, torn] if entry_of(torn) is not None else lines
        state = states_of(self._read(whole)).get(event.request or "")
        if state is not None and state.revoked is not None and len(state.revocations) > revocations:
            raise ValueError(
                f"the request {state.request!r} was revoked on {state.revoked} by the ledger {str(self.path)!r}, "
                f"after the work began that {event.event!r} is of: no entry is written, and it stays revoked. If it "
                "is to be one again, note that by hand, as received, or with what was made: "
                f"{command(self.path, 'trained', state.request)} --adapter FOLDER"
            )

    def _read(self, lines: Sequence[bytes] | None = None) -> Iterator[LedgerEntry]:
        """The entries, one at a time: a ledger of a server has as many as there were answers."""
        for one in chain(self._lines()[0] if lines is None else lines):
            if isinstance(one, LedgerFault):
                raise ValueError(f"{str(self.path)!r} is not a whole ledger: {str(one).rstrip('.')}.")
            yield one

    def _lines(self) -> tuple[list[bytes], bytes]:
        """The whole lines, and what follows the last one."""
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no ledger {str(self.path)!r}; its first entry makes it.")
        lines, torn = self._split()
        # A writer may be writing just now; who may only read cannot wait for it.
        if torn and os.access(self._file.parent, os.W_OK) and os.access(self.path, os.W_OK):
            with self._lock():
                lines, torn = self._split()
        return lines, torn

    def _split(self) -> tuple[list[bytes], bytes]:
        """As `_lines`, of the file as it is now."""
        *lines, torn = self.path.read_bytes().split(b"\n")
        return lines, torn

    def _last_entry(self, line: bytes | None) -> LedgerEntry | None:
        """The entry of the last whole line, after which another may be written; None where there is no line."""
        entry = None if line is None else entry_of(line)
        if line is not None and entry is None:
            raise ValueError(
                f"the last line of {str(self.path)!r} is no entry of a ledger, or was edited; nothing is "
                "written after it. See what Ledger.verify finds, and begin a new file."
            )
        return entry

    def _check_not_gone(self) -> None:
        """Raise if the file is gone in which this object has found or written entries."""
        if self._newest is not None and not self.path.exists():
            raise FileNotFoundError(
                f"the ledger {str(self.path)!r} is gone, and another in its place would not go on from its entries; "
                "put it back."
            )

    def _check_continues(self, last: LedgerEntry | None) -> None:
        """Raise if the file ends before an entry that was found in it or written to it, as one that was cut does."""
        newest, sequence = self._newest, -1 if last is None else last.sequence
        if newest is not None and (sequence < newest.sequence or (sequence == newest.sequence and last != newest)):
            raise ValueError(
                f"the ledger {str(self.path)!r} lacks entries that it had, and another would not go on from them; put "
                "it back."
            )

    @property
    def _file(self) -> Path:
        """The file itself: writers that reach it by a link have to wait for the same lock as the others."""
        return Path(os.path.realpath(self.path))

    def _check_folder(self) -> None:
        if not self._file.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(self._file.parent)!r} for the ledger; make it first.")

    def _lock(self) -> BaseFileLock:
        return FileLock(f"{self._file}.lock", timeout=SECONDS)

    def _moved_aside(self, torn: bytes) -> dict[str, Any]:
        """Copy a part of a line to a file of its own; the fields of the entry that says so."""
        digest = hashlib.sha256(torn).hexdigest()
        aside = self._file.with_name(f"{self._file.name}.torn-{digest[:12]}")
        with aside.open("wb") as file:
            file.write(torn)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(aside.parent)
        warn(
            f"the last line of {str(self.path)!r} was half-written, as by a killed process; its {len(torn)} bytes are "
            f"now in {aside.name!r}.",
        )
        return {"event": RECOVERED, "torn_bytes": len(torn), "torn_sha256": digest, "torn_file": aside.name}
