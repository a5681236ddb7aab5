"""Events and entries of the ledger of requests to forget."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from .digests import DataSummary
from .fields import is_count, is_sha256, read_object
from .spul_config import SPUL_CONFIG_NAME, read_spul_config, without_local_path
from .weights import file_digest

EVENTS = ("received", "trained", "evaluated", "served", "answered", "stopped", "revoked", "note")
"""Events of a request: its rows came in; a prompt was trained, or a fixed refusal made; it was measured, put into
service (from then on), turned on for an answer, taken out of service (until then), withdrawn for good; or a remark. An
answer that no gate put a prompt to is an entry, too, of no request."""
FOLLOWING = ("served", "answered", "stopped", "revoked")  # of a request that an earlier entry names
REOPENING = ("received", "trained")  # after which a request that was revoked is one again
RECOVERED = "recovered"  # the event of the ledger's own entries, on lines that killed writers left
WEIGHTS = ("adapter_model.safetensors", "unlearning_layers.safetensors")
GATE_FOLDER = "gate"  # of a saved prompt's gate, or of a fixed refusal's, beside the folders of other prompts
GATE = f"{GATE_FOLDER}/gate.json"
RIVAL = "spul_rival.json"  # of a method without training, such as a fixed refusal
DIGESTS = ("prompt_sha256", "base_fingerprint", "evaluation")
TEXTS = ("adapter", "gate", "server", "answer", "finish", "note")
COUNTS = ("prompt_tokens", "completion_tokens")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a prompt that is served, and so of its request
BASE = "__base__"  # in PEFT, the name of no adapter
AHEAD = timedelta(minutes=5)  # by which machines' clocks may differ


@dataclass(frozen=True)
class LedgerEvent:
    """An event of a request to forget.

    Args:
        event: one of `EVENTS`.
        request: name of the request, by which its prompt goes here and where it is served. Everybody who sees the
            ledger reads it, so a number rather than a person's name. None of an answer that no gate put a prompt to,
            and of nothing else.
        rows: number and keyed digest of the request's rows (`summarize_rows`); None if not known.
        adapter: last part of the folder's name, or the Hub name, of the saved prompt or other adapter; None if not
            known.
        prompt_sha256: SHA-256 of its weights' file (`weights_sha256` of its `spul_config.json`); None if not known.
        base_fingerprint: `fingerprint` of the base; None if not known.
        gate: kind of the gate in front of the prompt; None without one, or if not known.
        server: name of the server that began or ended to serve it, as each of several has one; None if not known.
        evaluation: SHA-256 of the evaluation: of the manifest of an evidence pack, or of `evaluation.json`.
        at: time of the event, ISO 8601 with its zone, where it is not that of the entry; at most five minutes ahead.
        note: a remark.
        answer: of an answer: its id, which the client got.
        finish: how it ended: `"stop"`, `"length"`, `"abandoned"` by its client, or `"error"` with a status.
        prompt_tokens, completion_tokens: numbers of its tokens, without virtual ones.
    """

    event: str
    request: str | None
    rows: DataSummary | None = None
    adapter: str | None = None
    prompt_sha256: str | None = None
    base_fingerprint: str | None = None
    gate: str | None = None
    evaluation: str | None = None
    at: str | None = None
    note: str | None = None
    answer: str | None = None
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    server: str | None = None

    @classmethod
    def of_adapter(cls, event: str, request: str, folder: str | os.PathLike, **others: Any) -> LedgerEvent:
        """An event with what the record of a saved adapter says: rows, digests of weights and base, kind of gate.

        A fixed refusal has no record and no weights: its event has the kind of its gate, no digest of its files, from
        which names in the gate and the text could be guessed, and the note `"fixed refusal"`.

        Args:
            event: as `event` above.
            request: as `request` above.
            folder: a local folder that `save_pretrained` wrote.
            others: further fields, which count instead of the record's.

        Raises:
            FileNotFoundError: if the folder has neither `spul_config.json` nor the file of a fixed refusal.
            ValueError: if a file in it is damaged.
        """
        path = Path(folder)
        gate = _kind_in(path / GATE, "a kind of gate") if (path / GATE).is_file() else None
        if not (path / SPUL_CONFIG_NAME).is_file():
            if not (path / RIVAL).is_file():
                raise FileNotFoundError(
                    f"{str(folder)!r} has no {SPUL_CONFIG_NAME}; pass a folder that save_pretrained of a prompt, of a "
                    "fixed refusal or of unlearning layers wrote."
                )
            kind, name = _kind_in(path / RIVAL, "a method without training"), without_local_path(os.fspath(folder))
            return cls(event, request, **{"adapter": name, "gate": gate, "note": kind, **others})
        record = read_spul_config(path)
        weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if weights is not None:
            record.check_weights(weights)
        found: dict[str, Any] = {
            "rows": record.forget,
            "adapter": record.name,
            "prompt_sha256": record.weights_sha256 if weights is None else file_digest(weights),
            "base_fingerprint": record.base_fingerprint,
            "gate": gate,
        }
        return cls(event, request, **found | others)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON.

        Raises:
            ValueError: if a field has another type than documented, or a value out of range.
        """
        if self.event not in EVENTS:
            raise ValueError(f"event={self.event!r} is not known; expected one of {', '.join(EVENTS)}.")
        is_bare = self.event == "answered" and self.adapter is None and self.request is None
        if not is_bare and (not isinstance(self.request, str) or not self.request.strip()):
            raise ValueError(f"request={self.request!r}; expected the name of a request, such as '2026-017'.")
        if self.request is not None and self.event not in FOLLOWING and not _is_name(self.request):
            raise ValueError(
                f"request={self.request!r}; expected a name of printable characters, without spaces around it."
            )
        if self.rows is not None:
            summary = self.rows
            if not isinstance(summary, DataSummary) or not is_count(summary.rows):
                raise ValueError(f"rows={summary!r}; expected a DataSummary, as summarize_rows(rows, key) makes it.")
            if summary.digest is not None and not is_sha256(summary.digest):
                raise ValueError(f"rows have the digest {summary.digest!r}; expected 64 hexadecimal digits, or None.")
        for name in DIGESTS:
            if (value := getattr(self, name)) is not None and not is_sha256(value):
                raise ValueError(f"{name}={value!r}; expected 64 hexadecimal digits, or None.")
        for name in TEXTS:
            if (value := getattr(self, name)) is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r}; expected text, or None.")
        if self.server is not None and self.event != "stopped":  # one that an earlier entry named oddly can be stopped
            check_server(self.server)
        if self.gate is not None and not self.gate.strip():
            raise ValueError(
                f"gate={self.gate!r}; expected the kind of a gate, such as 'names', or none: leave it out."
            )
        for name in COUNTS:
            if (value := getattr(self, name)) is not None and not is_count(value):
                raise ValueError(f"{name}={value!r}; expected a number of tokens, or None.")
        found = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return found if self.at is None else found | {"at": _in_utc(self.at)}


@dataclass(frozen=True)
class LedgerEntry:
    """A line of a ledger.

    Attributes:
        sequence: its number, from 0.
        time: when it was written, UTC.
        previous: digest of the line before; zeros in the first one.
        digest: SHA-256 of the line without this field.
        fields: the event's fields by name, those of later versions included.
        line: the whole line.
    """

    sequence: int
    time: str
    previous: str
    digest: str
    fields: Mapping[str, Any]
    line: str = field(repr=False, compare=False)

    @property
    def event(self) -> str:
        """One of `EVENTS`, or `"recovered"`."""
        return self.fields.get("event", "")

    @property
    def request(self) -> str | None:
        """The request's name; None of an answer without a prompt, and of an entry of the ledger itself."""
        return self.fields.get("request")

    @property
    def at(self) -> str:
        """Time of the event."""
        return self.fields.get("at", self.time)


def name_fault(name: Any) -> str | None:
    """Why no prompt can be served by a name, the request's; None if one can.

    Args:
        name: the name.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"{name!r:.80} is no name of 1 to 64 letters, digits, hyphens, underscores"
    if name == BASE:
        return f"{name!r} is the name of no prompt at all"
    if name == GATE_FOLDER:
        return f"{name!r} is the folder of a prompt's gate; lengthen it, such as 'request-{name}'"
    if name.isidentifier() and _is_taken_by_torch(name):
        return f"{name!r} is taken by PyTorch in the module that holds prompts; lengthen it, such as 'request-{name}'"
    return None


def check_server(name: str, argument: str = "server", example: str = "gpu-1") -> None:
    """Raise unless a server may be called so.

    Args:
        name: its name.
        argument: the argument's name, for the message.
        example: a value of it, likewise.

    Raises:
        ValueError: if not.
    """
    if not name or not _is_name(name):
        raise ValueError(
            f"{argument}={name!r}; expected a name of printable characters, without spaces around it, such as "
            f"{example!r}, or none: leave it out."
        )


def _is_taken_by_torch(name: str) -> bool:
    """Whether the module in which PEFT keeps prompts, as attributes, has one of this name."""
    from torch import nn  # slow to import, and not needed for a number such as 2026-017

    return hasattr(nn.ModuleDict(), name)


def _is_name(request: str) -> bool:
    """Whether a request may be called so; those of earlier entries that are not can still be revoked."""
    return request.isprintable() and request == request.strip()


def are_fields(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a line have the types of an event's; those of later versions may have any."""
    rows = fields.get("rows", {"rows": 0})
    return (
        isinstance(fields.get("event"), str)
        and all(isinstance(fields.get(name, ""), str) for name in ("request", "at", *DIGESTS, *TEXTS, "prompt"))
        and all(is_count(fields.get(name, 0)) for name in COUNTS)
        and isinstance(rows, dict)
        and is_count(rows.get("rows"))
    )


def _kind_in(path: Path, what: str) -> str:
    """The kind that a file of a saved gate, or of a method without training, gives."""
    kind = read_object(path).get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: kind is {kind!r:.80}; expected the name of {what}. Save it again.")
    return kind


def _in_utc(at: str) -> str:
    """A time that has been, in ISO 8601 with its zone, in UTC."""
    known = moment(at)
    if known is None:
        raise ValueError(f"at={at!r}; expected a time with its zone, such as '2026-03-01T09:30:00Z'.")
    if known > datetime.now(timezone.utc) + AHEAD:
        raise ValueError(
            f"at={at!r} is in the future, and the event would count from now on; note it when it has been."
        )
    return utc(known, "seconds")


def moment(time: str) -> datetime | None:
    """The time, in UTC, that ISO 8601 with its zone says; None if it is not that."""
    try:
        found = datetime.fromisoformat(time.replace("Z", "+00:00"))
        return None if found.tzinfo is None else found.astimezone(timezone.utc)
    except (AttributeError, ValueError, OverflowError):  # in UTC the first day may be one before the calendar's
        return None


def utc(time: datetime, timespec: str) -> str:
    """A time in UTC as ISO 8601, to the unit that `timespec` names."""
    return time.isoformat(timespec=timespec).replace("+00:00", "Z")
