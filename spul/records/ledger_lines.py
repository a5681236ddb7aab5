"""Lines of a ledger: the entry of a line, the line of an event, and what breaks the chain of their digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .fields import is_count, unique_keys
from .ledger_events import RECOVERED, LedgerEntry, are_fields, moment, utc

FORMAT = 1  # of a line; higher once a field's meaning changes
FIRST = "0" * 64  # `previous` of the first line
CHAIN = ("format", "sequence", "time", "previous", "digest")  # fields of a line; all others are the event's
LINE = re.compile(rb'(\{.*), "digest": "([0-9a-f]{64})"\}')


@dataclass(frozen=True)
class LedgerFault:
    """A line that does not fit the chain, or a head that is not in it; also a remark on a line of a whole chain.

    Attributes:
        line: the line's number in the file, from 1; 0 of the whole file.
        reason: in words.
    """

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}" if self.line else self.reason


def next_line(previous: LedgerEntry | None, fields: Mapping[str, Any]) -> tuple[LedgerEntry, bytes]:
    """The entry of an event after another entry, and its line."""
    sequence, before = (0, FIRST) if previous is None else (previous.sequence + 1, previous.digest)
    time = utc(datetime.now(timezone.utc), "milliseconds")
    of_chain = {"format": FORMAT, "sequence": sequence, "time": time, "previous": before}
    content = json.dumps(of_chain | dict(fields))
    digest = hashlib.sha256(content.encode("ascii")).hexdigest()
    line = f'{content[:-1]}, "digest": "{digest}"}}\n'
    return LedgerEntry(sequence, time, before, digest, fields, line), line.encode("ascii")


def _parsed(line: bytes) -> LedgerEntry | None:
    """The entry that a line says it is; None if it is none."""
    match = LINE.fullmatch(line)
    try:
        record = json.loads(line, object_pairs_hook=unique_keys) if match else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not is_count(record.get("sequence")):
        return None
    fields = {name: value for name, value in record.items() if name not in CHAIN}
    if not all(isinstance(record.get(name), str) for name in ("time", "previous", "digest")) or not are_fields(fields):
        return None
    sequence, time, previous, digest = (record[name] for name in CHAIN[1:])
    return LedgerEntry(sequence, time, previous, digest, fields, f"{line.decode()}\n")


def _content_digest(line: bytes) -> str:
    """SHA-256 of a line without its field `digest`."""
    match = LINE.fullmatch(line)
    return "" if match is None else hashlib.sha256(match[1] + b"}").hexdigest()


def entry_of(line: bytes) -> LedgerEntry | None:
    """The entry of a line, without its line break; None if it is none, or was edited."""
    entry = _parsed(line)
    return entry if entry is not None and entry.digest == _content_digest(line) else None


def chain(lines: Sequence[bytes]) -> Iterator[LedgerEntry | LedgerFault]:
    """The entry of each line, or the fault by which it breaks the chain."""
    digests: dict[int, str] = {-1: FIRST}
    expected = 0
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        if entry is None:
            yield LedgerFault(number, "it is no entry of a ledger of this version, or was damaged")
            expected += 1
            continue
        sequence, before = entry.sequence, digests.get(entry.sequence - 1, entry.previous)
        reason = ""
        if (found := _content_digest(line)) != entry.digest:
            reason = f"it was edited: its content has the SHA-256 {found[:12]}..., not {entry.digest[:12]}..."
        elif sequence < expected:
            reason = f"entry {sequence} stands after entry {expected - 1}: moved, or twice"
        elif sequence > expected:
            what = f"entry {expected} is" if sequence == expected + 1 else f"entries {expected} to {sequence - 1} are"
            reason = f"{what} missing before entry {sequence}"
        elif entry.previous != before:
            reason = f"it does not continue entry {sequence - 1}, which was written anew, or this is another's"
        yield LedgerFault(number, reason) if reason else entry
        digests.setdefault(sequence, entry.digest)
        expected = max(expected, sequence + 1)


def remarks(entries: Iterable[LedgerEntry]) -> Iterator[LedgerFault]:
    """Remarks on entries of a whole chain: half lines that were moved aside, and times that do not go on.

    Clocks are set back and differ between machines, so such a time breaks no chain.
    """
    before: tuple[str, datetime] | None = None
    for entry in entries:
        line, written = entry.sequence + 1, moment(entry.time)
        if entry.event == RECOVERED:
            yield LedgerFault(line, f"a killed writer's half line was moved to {entry.fields.get('torn_file')}")
        if written is None:
            yield LedgerFault(line, f"its time is {entry.time!r}, which is none in ISO 8601 with its zone")
            continue
        if before is not None and written < before[1]:
            reason = "a clock was set back, or the writers' clocks differ"
            yield LedgerFault(line, f"its time {entry.time} is before that of the line before, {before[0]}: {reason}")
        if (at := moment(entry.at)) is not None and at > written:
            yield LedgerFault(line, f"its event is of {entry.at}, after its time {entry.time}")
        before = entry.time, written
