"""The state of a request to forget, as the entries of a ledger leave it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .digests import DataSummary
from .ledger_events import REOPENING, LedgerEntry

WORDS = {
    "adapter": "adapter",
    "prompt_sha256": "SHA-256 of the prompt",
    "base_fingerprint": "fingerprint of the base",
    "gate": "gate",
    "evaluation": "SHA-256 of the evaluation",
}  # fields of an entry, and of a request's state, as readers see them


@dataclass
class Occurrence:
    """An event of a request; answers between two other events count as one.

    Attributes:
        event: one of `EVENTS`, or one of a later version.
        start, end: times of the first and of the last.
        num: how many.
        note: the remark of the last.
        server: name of the server that noted it; None if it does not say.
    """

    event: str
    start: str
    end: str
    num: int = 1
    note: str | None = None
    server: str | None = None

    def __str__(self) -> str:
        when = self.start if self.end == self.start else f"{self.start} to {self.end}"
        times = f" {self.num:,} times" if self.num > 1 else ""
        by = "" if self.server is None else f" by {self.server}"
        return f"{when} {self.event}{by}{times}" + (f": {' '.join(self.note.split())}" if self.note else "")


@dataclass
class RequestState:
    """A request as the ledger's entries leave it.

    Attributes:
        request: its name.
        rows: the last that an entry gave; a number without a digest takes the place of a digest by `received` alone.
        adapter, prompt_sha256, base_fingerprint, gate: of one prompt or refusal, the last that was trained, or that
            served or answered since.
        evaluation: last value that an entry gave.
        history: its events, in the order of the entries, with their times.
        served: times from and until which some server served it; None at the end of the last if one still does.
        servers: since when each server serves it, by its name: those that noted a start, and no stop since. Entries
            without a name are those of one more server, None.
        answered: number of answers under its prompt.
        answered_after: number of those while it was withdrawn: under way just then, or of a server that was not told.
        revoked: when it was withdrawn; None if it was not, or has been received or trained anew since.
        revocations: each time at which it was withdrawn.
        is_retrained: whether a prompt was trained since it was last withdrawn.
        retrained: SHA-256 of that prompt; None if not known, or none was.
        weights: SHA-256 of each prompt that entries gave.
        withdrawn: those that they had given when it was last withdrawn.
        served_again: whether it was served while it was withdrawn.
        evaluated: adapter and SHA-256 of what was evaluated last, each None if not known; None if nothing was.
    """

    request: str
    rows: DataSummary | None = None
    adapter: str | None = None
    prompt_sha256: str | None = None
    base_fingerprint: str | None = None
    gate: str | None = None
    evaluation: str | None = None
    history: list[Occurrence] = field(default_factory=list)
    served: list[tuple[str, str | None]] = field(default_factory=list)
    servers: dict[str | None, str] = field(default_factory=dict)
    answered: int = 0
    answered_after: int = 0
    revoked: str | None = None
    revocations: list[str] = field(default_factory=list)
    is_retrained: bool = False
    retrained: str | None = None
    weights: set[str] = field(default_factory=set)
    withdrawn: set[str] = field(default_factory=set)
    served_again: bool = False
    evaluated: tuple[str | None, str | None] | None = None

    def add(self, entry: LedgerEntry) -> None:
        """Take an entry of this request into account."""
        self._add_server(entry)
        # A server that gives up an earlier prompt says nothing of one that others serve, or that was trained since.
        if entry.event != "stopped":
            self._add_prompt(entry)
        self._add_evaluation(entry)
        if (rows := entry.fields.get("rows")) is not None:
            found = DataSummary(rows["rows"], rows.get("digest"))
            # A training or evaluation without the owner's key only counts the rows that were received by a digest.
            if entry.event == "received" or found.digest is not None or self.rows is None or self.rows.digest is None:
                self.rows = found
        if "prompt_sha256" in entry.fields:
            self.weights.add(entry.fields["prompt_sha256"])
        last = self.history[-1] if self.history else None
        if last is not None and last.event == entry.event == "answered":
            last.num, last.end, last.note = last.num + 1, entry.at, entry.fields.get("note", last.note)
        else:
            note, server = (entry.fields.get(name) for name in ("note", "server"))
            self.history.append(Occurrence(entry.event, entry.at, entry.at, note=note, server=server))
        self.answered += entry.event == "answered"
        self.answered_after += entry.event == "answered" and self.revoked is not None
        self.served_again |= entry.event == "served" and self.revoked is not None
        if entry.event == "revoked":
            self.revoked, self.is_retrained, self.retrained = entry.at, False, None
            self.revocations.append(entry.at)
            self.withdrawn = set(self.weights)
        elif entry.event in REOPENING:
            self.revoked = None
        if entry.event == "trained":
            self.is_retrained, self.retrained = True, entry.fields.get("prompt_sha256")

    def is_replaced(self, prompt_sha256: str | None) -> bool:
        """Whether it was revoked, and trained anew since as other weights than these, or they cannot be told apart.

        Weights that are not known (None) count as earlier ones. Where those that were trained anew are not known, all
        that it had until it was revoked do.
        """
        if not (self.revocations and self.is_retrained):
            return False
        if None in (prompt_sha256, self.retrained):
            return prompt_sha256 is None or prompt_sha256 in self.withdrawn
        return prompt_sha256 != self.retrained

    def has_withdrawn(self, prompt_sha256: str) -> bool:
        """Whether weights are some that it had before, where it is revoked, or was trained anew since as others."""
        if self.revoked is not None:
            return prompt_sha256 in self.weights
        return prompt_sha256 in self.withdrawn and self.is_replaced(prompt_sha256)

    def _add_prompt(self, entry: LedgerEntry) -> None:
        """Take into account of which prompt an entry is: of another than the last, only what the entry itself says."""
        found = {name: entry.fields.get(name) for name in ("prompt_sha256", "base_fingerprint", "gate")}
        found["adapter"] = _adapter_of(entry)
        is_other = _differ(self._prompt, (found["adapter"], found["prompt_sha256"]))
        if entry.event == "evaluated" and is_other:
            return  # what was measured need not be what is served
        was_evaluated = self._prompt != (None, None) and self.evaluated == self._prompt
        for name, value in found.items():
            if value is not None or is_other or entry.event == "trained":
                setattr(self, name, value)
        if was_evaluated and not is_other and entry.event != "trained":  # the entry only says more of it
            self.evaluated = self._prompt

    def _add_evaluation(self, entry: LedgerEntry) -> None:
        """Take into account of which prompt the evaluation is that an entry gives."""
        if "evaluation" not in entry.fields:
            return
        said = _adapter_of(entry), entry.fields.get("prompt_sha256")
        is_own = _differ(self._prompt, said) or (entry.event == "evaluated" and said == (None, None))
        self.evaluation, self.evaluated = entry.fields["evaluation"], said if is_own else self._prompt

    @property
    def _prompt(self) -> tuple[str | None, str | None]:
        return self.adapter, self.prompt_sha256

    def _add_server(self, entry: LedgerEntry) -> None:
        """Take into account which servers serve the request after an entry; where it is revoked, none does."""
        server, was_served = entry.fields.get("server"), bool(self.servers)
        if entry.event == "served":
            self.servers.setdefault(server, entry.at)  # after a restart it is still the same service
        elif entry.event == "stopped":
            self.servers.pop(server, None)
        elif entry.event == "revoked":
            self.servers.clear()
        if self.servers and not was_served:
            self.served.append((entry.at, None))
        elif was_served and not self.servers:
            self.served[-1] = (self.served[-1][0], entry.at)

    def in_words(self) -> list[str]:
        """The state as lines of text: what is known, each event with its time, and how it is now."""
        lines = _known(self.rows, {name: getattr(self, name) for name in WORDS})
        if self.evaluated is not None and _named(*self.evaluated) != _named(*self._prompt):
            lines.append(self._of_another(*self.evaluated))
        if self.evaluation is None and (self.served or self.answered):
            lines.append("it was served, and no entry gives an evaluation")
        lines += map(str, self.history)
        if self.answered:
            after = f", {self.answered_after:,} of them after it was revoked" if self.answered_after else ""
            lines.append(f"answers under it: {self.answered:,}{after}")
        lines.append(f"now: {self.now}")
        if self.served_again:
            lines.append("SERVED AFTER IT WAS REVOKED")
        return lines

    def _of_another(self, adapter: str | None, prompt_sha256: str | None) -> str:
        """That the evaluation is of another prompt, or may be, in words: which, as its entry names it."""
        which = ": its entry names none" if adapter is None else f", adapter {adapter}"
        which = which if prompt_sha256 is None else f", SHA-256 {prompt_sha256}"
        is_known = None not in (prompt_sha256, self.prompt_sha256)
        return f"the evaluation {'is' if is_known else 'may be'} of another prompt{which}"

    @property
    def now(self) -> str:
        """Whether it is served, in words: since when, and by which servers."""
        if self.servers:
            names = sorted(name for name in self.servers if name is not None)
            return f"served since {self.served[-1][0]}" + (f" by {', '.join(names)}" if names else "")
        if self.revoked is not None:
            # What another request's gate flags, as where both name a person, is answered under that one.
            return f"revoked since {self.revoked}: the base answers again what no other gate flags"
        return "no longer served" if self.served else "never served"


def states_of(entries: Iterable[LedgerEntry]) -> dict[str, RequestState]:
    """Each request as entries leave it, by its name.

    Args:
        entries: those of a ledger, in order.
    """
    found: dict[str, RequestState] = {}
    for entry in entries:
        add_to(found, entry)
    return found


def add_to(states: dict[str, RequestState], entry: LedgerEntry) -> None:
    """Take an entry into account in the state of its request, if it has one.

    Args:
        states: each request by its name.
        entry: the next one of a ledger.
    """
    if entry.request is not None:
        states.setdefault(entry.request, RequestState(entry.request)).add(entry)


def entry_in_words(entry: LedgerEntry) -> list[str]:
    """An entry as lines of text: which request, its event with its time, and what else it says, its digest last."""
    said = entry.fields
    rows = None if said.get("rows") is None else DataSummary(said["rows"]["rows"], said["rows"].get("digest"))
    event = Occurrence(entry.event, entry.at, entry.at, note=said.get("note"), server=said.get("server"))
    return [f"request: {entry.request}", str(event), *_known(rows, said), f"digest: {entry.digest}"]


def _known(rows: DataSummary | None, values: Mapping[str, Any]) -> list[str]:
    """Facts of a request or of an entry, a line each."""
    keyed = "" if rows is None or rows.digest is None else f", HMAC-SHA256 {rows.digest}"
    lines = [] if rows is None else [f"rows: {rows.rows:,}{keyed}"]
    return lines + [f"{word}: {values[name]}" for name, word in WORDS.items() if values.get(name) is not None]


def _adapter_of(entry: LedgerEntry) -> str | None:
    """The adapter that an entry names; earlier versions wrote it as `prompt`, and servers the request's name there."""
    before = entry.fields.get("prompt")
    return entry.fields.get("adapter", None if before == entry.request else before)


def _named(adapter: str | None, prompt_sha256: str | None) -> str | None:
    """The mark of a prompt among others: its weights, where an entry gives them, else its name, if there is one."""
    return adapter if prompt_sha256 is None else prompt_sha256


def _differ(known: tuple[str | None, str | None], said: tuple[str | None, str | None]) -> bool:
    """Whether two prompts, adapter and SHA-256 of each, are others: by weights or else name, the first that both give.

    Where they give none in common they are; where one gives neither, it tells nothing.
    """
    for before, after in ((known[1], said[1]), (known[0], said[0])):
        if None not in (before, after):
            return before != after
    return known != (None, None) != said
