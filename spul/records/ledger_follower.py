"""A ledger that others write, read on while it grows."""

from __future__ import annotations

import os
from pathlib import Path

from .ledger_events import LedgerEntry
from .ledger_lines import FIRST, entry_of
from .ledger_states import RequestState, add_to


class LedgerFollower:
    """The requests of a ledger as they are now, at the cost of the entries that are new since the last call.

    What was read before is not read again: `Ledger.verify` finds what was changed there. For one thread at a time.

    Args:
        path: the ledger's file; one that is not there yet has no requests.

    Example:
        ```python
        follower = LedgerFollower("ledger.jsonl")
        while True:
            print(follower.revoked())  # also what another program has just written
            time.sleep(60)
        ```
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._states: dict[str, RequestState] = {}
        self._end = 0  # of the last line that was read
        self._last: LedgerEntry | None = None

    def states(self) -> dict[str, RequestState]:
        """Each request as the entries leave it, by its name; a line that is being written counts once it is whole.

        Raises:
            FileNotFoundError: if the file is gone.
            ValueError: if a new line does not continue the chain, or lines that were read are missing.
        """
        if self._end == 0 and not self.path.exists():
            return self._states
        size = self.path.stat().st_size
        if size < self._end:
            raise self._broken("entries that were read are missing")
        if size > self._end:
            with self.path.open("rb") as file:
                file.seek(self._end)
                *lines, _ = file.read().split(b"\n")
            for line in lines:
                self._take(line)
        return self._states

    def revoked(self) -> dict[str, str]:
        """The time at which each request was revoked that is so now, by its name.

        Raises:
            FileNotFoundError, ValueError: as `states`.
        """
        return {name: state.revoked for name, state in self.states().items() if state.revoked is not None}

    def _take(self, line: bytes) -> None:
        entry = entry_of(line)
        sequence, previous = (-1, FIRST) if self._last is None else (self._last.sequence, self._last.digest)
        if entry is None or (entry.sequence, entry.previous) != (sequence + 1, previous):
            raise self._broken(f"what follows entry {sequence} does not continue it")
        add_to(self._states, entry)
        self._last, self._end = entry, self._end + len(line) + 1

    def _broken(self, reason: str) -> ValueError:
        return ValueError(
            f"{str(self.path)!r} is not the ledger that was read: {reason}. Put it back, or, where spul ledger "
            "verify finds it whole, begin anew: restart the server."
        )
