"""`spul ledger`: verify, show and add to the ledger of requests to forget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..records.ledger_events import EVENTS
from .command import Command, printable
from .shared import option

if TYPE_CHECKING:
    from ..records.ledger import Ledger
    from ..records.ledger_events import LedgerEntry


@dataclass
class LedgerOptions:
    """Options of `spul ledger show` and `spul ledger head`."""

    ledger: str = option("the ledger's file, JSON lines", ...)


@dataclass
class VerifyOptions(LedgerOptions):
    """Options of `spul ledger verify`."""

    head: str | None = option("a head noted earlier (spul ledger head): without it a missing end cannot be seen")


@dataclass
class AddOptions(LedgerOptions):
    """Options of `spul ledger add`."""

    event: str = option(f"one of {', '.join(EVENTS)}", ...)
    request: str = option(
        "name of the request, a number rather than a person's name; its prompt is served by the same name", ...
    )
    adapter: str | None = option(
        "folder of the saved prompt, whose record gives what is not given here, or of a fixed refusal"
    )
    rows: str | None = option("file of the request's rows, as of train; their number and digest are kept")
    digest_key: str | None = option("file with the owner's key, for the rows' digest")
    evaluation: str | None = option("folder of an evidence pack or of an evaluation")
    gate: str | None = option("kind of the gate")
    server: str | None = option("name of the server that began or ended to serve the prompt, as show has it")
    at: str | None = option("time of the event, if it is not now, such as 2026-03-01T09:30:00Z")
    note: str | None = option("a remark")


@dataclass
class EvidenceOptions:
    """Options of `spul ledger evidence`."""

    folder: str = option("the evidence pack", ...)
    ledger: str | None = option("the ledger that its entry was added to")


def verify(options: VerifyOptions) -> int:
    """Print every line that breaks the chain, 1 if there is one; of a whole one what else there is to know."""
    from ..records.ledger import Ledger
    from ..records.ledger_lines import remarks

    ledger = Ledger(options.ledger)
    faults = ledger.verify(options.head)
    for fault in faults:
        print(printable(str(fault)))
    if faults:
        return 1
    entries = ledger.entries()
    known = "" if options.head is None else f", and has the head {options.head[:12]}... noted earlier"
    print(f"{options.ledger}: {len(entries)} entries, the chain is whole{known}")
    if entries:
        print(_counted(entries))
    for remark in remarks(entries):
        print(printable(str(remark)))
    if options.head is None:
        print("A missing end cannot be seen without --head.")
    return 0


def _counted(entries: Sequence[LedgerEntry]) -> str:
    """The number of entries of each event."""
    counts = Counter(entry.event for entry in entries)
    bare = sum(entry.event == "answered" and entry.request is None for entry in entries)
    notes = {"answered": f" ({bare:,} without a prompt)"} if bare else {}
    return ", ".join(f"{num:,} {event}{notes.get(event, '')}" for event, num in counts.items())


def head(options: LedgerOptions) -> None:
    """Print the digest of the last entry."""
    from ..records.ledger import Ledger

    print(Ledger(options.ledger).head())


def show(options: LedgerOptions) -> None:
    """Print each request, its events with their times, and whether it is served."""
    from ..records.ledger import Ledger

    for state in Ledger(options.ledger).states().values():
        print(printable(state.request))
        for line in state.in_words():
            print(f"  {printable(line)}")


def add(options: AddOptions) -> None:
    """Append an entry, and print it with its digest and how its request is now."""
    from ..records.ledger import Ledger
    from ..records.ledger_events import FOLLOWING, LedgerEvent
    from ..records.ledger_states import entry_in_words

    if options.digest_key is not None and options.rows is None:
        raise ValueError("--digest_key is given without --rows; give the rows that are to be digested.")
    ledger = Ledger(options.ledger)
    if options.event in EVENTS and options.event not in FOLLOWING:
        ledger.check_name(options.request)
    _check_server(options, ledger)
    fields = {name: getattr(options, name) for name in ("gate", "server", "at", "note")}
    found = {name: value for name, value in fields.items() if value is not None}
    if options.rows is not None:
        from ..data.prompt_files import read_prompts  # torch, which is slow to import
        from ..records.digests import summarize_rows

        found["rows"] = summarize_rows(read_prompts(options.rows), options.digest_key)
    if options.evaluation is not None:
        from ..evaluation.evidence import evaluation_digest

        found["evaluation"] = evaluation_digest(options.evaluation)
    if options.adapter is None:
        event = LedgerEvent(options.event, options.request, **found)
    else:
        event = LedgerEvent.of_adapter(options.event, options.request, options.adapter, **found)
    entry = ledger.append(event)
    print(f"{options.ledger}, entry {entry.sequence}:")
    for line in entry_in_words(entry):
        print(f"  {printable(line)}")
    try:
        now = ledger.states()[options.request].now
    except ValueError as error:
        raise ValueError(f"the entry is written, and not to be added again; but {error}") from error
    print(f"  now: {printable(now)}")


def _check_server(options: AddOptions, ledger: Ledger) -> None:
    """Raise for a stop of a server that does not serve the request while others do, by which nothing would change."""
    from ..records.ledger_events import check_server

    if options.event != "stopped" or not ledger.path.is_file():
        return
    state = ledger.states().get(options.request)
    servers = {} if state is None else state.servers
    if options.server in servers:
        return
    if options.server is not None:
        check_server(options.server)
    if not servers:
        return
    names = ", ".join("one without a name" if name is None else printable(name) for name in servers)
    given = "server is not given" if options.server is None else f"server={options.server!r}"
    raise ValueError(
        f"{given}, and the request {options.request!r} is served by {names}; name the one that has stopped, by "
        "--server NAME, or note the event revoked."
    )


def evidence(options: EvidenceOptions) -> int:
    """Print what in an evidence pack is not as it was written; 1 if there is something."""
    from ..evaluation.evidence import evaluation_digest, verify_evidence

    faults = verify_evidence(options.folder, options.ledger)
    for fault in faults:
        print(printable(str(fault)))
    if faults:
        return 1
    print(
        f"{options.folder}: every part is as it was written; SHA-256 of the whole: {evaluation_digest(options.folder)}"
    )
    if options.ledger is None:
        print("A pack that was written anew as a whole cannot be seen without --ledger.")
    return 0


COMMANDS = {
    "verify": Command(
        VerifyOptions,
        verify,
        "spul ledger verify --ledger ledger.jsonl --head 5f0c...",
        "find an edited, missing or moved line of a ledger; exit status 1 if there is one",
    ),
    "show": Command(
        LedgerOptions,
        show,
        "spul ledger show --ledger ledger.jsonl",
        "each request: its events with their times, and whether it is served",
    ),
    "head": Command(
        LedgerOptions,
        head,
        "spul ledger head --ledger ledger.jsonl >> somewhere-else.txt",
        "the digest of the last entry, to be noted elsewhere",
    ),
    "add": Command(
        AddOptions,
        add,
        "spul ledger add --ledger ledger.jsonl --event revoked --request 2026-017 --note 'at their wish'",
        "add an entry by hand",
    ),
    "evidence": Command(
        EvidenceOptions,
        evidence,
        "spul ledger evidence --folder evidence --ledger ledger.jsonl",
        "find a changed, missing or added part of an evidence pack; exit status 1 if there is one",
    ),
}
