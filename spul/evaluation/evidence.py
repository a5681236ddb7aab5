"""An evidence pack: report, card, measurements and ledger entry in a folder, whose parts name each other by digest."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..records.card import CARD_NAME
from ..records.digests import DataSummary
from ..records.fields import read_object
from ..records.files import SCRATCH, atomic_folder, check_can_hold, write_text
from ..records.ledger import Ledger
from ..records.ledger_events import LedgerEvent, utc
from ..records.ledger_lines import entry_of
from ..records.spul_config import library_versions
from ..records.weights import file_digest
from .report.card import evidence_card
from .report.report import write_report
from .results import EVALUATION_NAME, MEASUREMENTS_NAME, Evaluation

MANIFEST_NAME, ENTRY_NAME = "manifest.json", "ledger-entry.jsonl"
FORMAT = 1  # of the manifest


def write_evidence(
    evaluation: Evaluation,
    folder: str | os.PathLike,
    ledger: str | os.PathLike | None = None,
    request: str | None = None,
) -> str:
    """Write an evidence pack of an evaluation, whatever the model was unlearned by.

    The folder gets `report.md`, `report.html` and figures, a card (`README.md`, with the results in the Hub's form),
    `evaluation.json`, `measurements.jsonl`, `manifest.json` with the SHA-256 of each of these, and
    `ledger-entry.jsonl`, a ledger's entry with the manifest's SHA-256. It holds no rows and no plain digest of rows.

    Args:
        evaluation: one evaluation, of a single model.
        folder: a new or empty folder.
        ledger: the ledger to add the entry to, which then is copied into the folder; None (default) begins one in
            the folder.
        request: name of the request that the entry is of. A ledger of several requests needs it; in the folder's own
            it is by default the adapter's name, else `"evaluation"`.

    Returns:
        SHA-256 of the manifest, which stands for the whole folder.

    Raises:
        FileExistsError: if the folder is not empty.
        ImportError: if matplotlib is not installed.
        ValueError: if several evaluations are joined, a ledger is given without a request, or it is damaged.
    """
    if ledger is not None and request is None:
        raise ValueError(
            f"the ledger {str(ledger)!r} is given without a request; name that of which the evaluation is, as it is "
            "named there, such as request='2026-017'."
        )
    facts, path = evaluation.facts, Path(folder)
    if "seeds" in facts:
        raise ValueError("the evaluation is joined of several; write an evidence pack for each of them.")
    check_new(path, ledger)
    with atomic_folder(path) as scratch:
        _without_plain_digests(evaluation).save(scratch)
        data = {name: file_digest(scratch / name) for name in (EVALUATION_NAME, MEASUREMENTS_NAME)}
        write_report(evaluation, scratch, data)
        write_text(scratch / CARD_NAME, evidence_card(evaluation, data))
        record = {
            "format": FORMAT,
            "time": utc(datetime.now(timezone.utc), "seconds"),
            "adapter": facts.get("adapter"),
            "weights_sha256": facts.get("weights_sha256"),
            "model_digest": evaluation.settings.get("models", {}).get("model", {}).get("weights"),
            "base": facts.get("base"),
            "base_fingerprint": facts.get("base_fingerprint"),
            "versions": library_versions(),
            "files": {name: file_digest(part) for name, part in _parts(scratch).items()},
        }
        write_text(scratch / MANIFEST_NAME, json.dumps(record, indent=1) + "\n")
        manifest = file_digest(scratch / MANIFEST_NAME)
        rows = facts.get("rows", {}).get("train_forget")
        event = LedgerEvent(
            "evaluated",
            request if request is not None else facts.get("adapter") or "evaluation",
            rows=None if rows is None else DataSummary(**rows),
            adapter=facts.get("adapter_name") or facts.get("adapter"),
            prompt_sha256=facts.get("weights_sha256"),
            base_fingerprint=facts.get("base_fingerprint"),
            evaluation=manifest,
        )
        entry = Ledger(scratch / ENTRY_NAME if ledger is None else ledger).append(event)
        Path(f"{scratch / ENTRY_NAME}.lock").unlink(missing_ok=True)
        write_text(scratch / ENTRY_NAME, entry.line)
    return manifest


def check_new(folder: str | os.PathLike, ledger: str | os.PathLike | None = None) -> None:
    """Raise unless evidence can be written into a folder, and noted in a ledger.

    Raises:
        FileExistsError: if it is not empty, or a file.
        FileNotFoundError, PermissionError: if folder or ledger may not be written, or the ledger's is not there.
        ValueError: if the ledger is damaged, or in the folder.
    """
    check_can_hold(folder)
    path = Path(folder)
    if ledger is not None:
        if Path(ledger).resolve().is_relative_to(path.resolve()):
            raise ValueError(f"the ledger {str(ledger)!r} is in the folder of the evidence; expected it elsewhere.")
        Ledger(ledger).check_goes_on()
    if path.is_dir() and any(not one.name.startswith(SCRATCH) for one in path.iterdir()):
        raise FileExistsError(f"{str(folder)!r} is not empty; evidence is not written over. Name a new folder.")


def verify_evidence(folder: str | os.PathLike, ledger: str | os.PathLike | None = None) -> list[str]:
    """Faults of an evidence pack: all that is not as it was written.

    Args:
        folder: the folder that `write_evidence` wrote.
        ledger: the ledger that its entry was added to, which is verified, too; None checks the entry alone. The entry
            may be written anew with all other parts: only the ledger, or the manifest's SHA-256 noted elsewhere, shows
            that.

    Returns:
        The faults in words; [] if there is none.

    Raises:
        FileNotFoundError: if the folder has no manifest, or there is no such ledger.
        ValueError: if the manifest cannot be read.
    """
    path = Path(folder)
    if not (path / MANIFEST_NAME).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {MANIFEST_NAME}; pass a folder that write_evidence wrote.")
    manifest = read_object(path / MANIFEST_NAME)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{MANIFEST_NAME} in {str(folder)!r} has the format {manifest.get('format')!r}; expected {FORMAT}, "
            "by which this version writes evidence packs."
        )
    named = manifest.get("files")
    if not isinstance(named, dict):
        raise ValueError(f"{MANIFEST_NAME} in {str(folder)!r} names no files; it is not that of an evidence pack.")
    found = {name: file_digest(part) for name, part in _parts(path).items()}
    faults = [f"{name} is missing" for name in named if name not in found]
    faults += [f"{name} was changed" for name in named if name in found and named[name] != found[name]]
    faults += [f"{name} is not named by {MANIFEST_NAME}" for name in found if name not in named]
    line = (path / ENTRY_NAME).read_bytes() if (path / ENTRY_NAME).is_file() else b""
    entry = entry_of(line.removesuffix(b"\n"))
    if entry is None:
        return [*faults, f"{ENTRY_NAME} is missing, or was changed"]
    if entry.fields.get("evaluation") != file_digest(path / MANIFEST_NAME):
        faults.append(f"{MANIFEST_NAME} was changed: the entry in {ENTRY_NAME} has another SHA-256")
    if ledger is not None:
        faults += [f"{Path(ledger).name}, {fault}" for fault in Ledger(ledger).verify(entry.digest)]
    return faults


def evaluation_digest(folder: str | os.PathLike) -> str:
    """SHA-256 that stands for an evaluation in a ledger: of its pack's manifest, else of its `evaluation.json`.

    Raises:
        FileNotFoundError: if the folder has neither.
    """
    for name in (MANIFEST_NAME, EVALUATION_NAME):
        if (path := Path(folder, name)).is_file():
            return file_digest(path)
    raise FileNotFoundError(
        f"{str(folder)!r} has neither {MANIFEST_NAME} nor {EVALUATION_NAME}; pass a folder of write_evidence, or the "
        "output_dir of spul.evaluate."
    )


def _parts(folder: Path) -> dict[str, Path]:
    """The files that a manifest names: all but itself and the entry that names it."""
    files = {part.relative_to(folder).as_posix(): part for part in sorted(folder.rglob("*")) if part.is_file()}
    return {name: part for name, part in files.items() if name not in (MANIFEST_NAME, ENTRY_NAME)}


def _without_plain_digests(evaluation: Evaluation) -> Evaluation:
    """The evaluation with digests of rows under a key that nobody keeps: the same rows still have the same."""
    key = secrets.token_bytes(32)

    def keyed(value: str) -> str:
        return value and hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:16]

    measurements: list[Any] = [dataclasses.replace(one, digest=keyed(one.digest)) for one in evaluation.measurements]
    return dataclasses.replace(evaluation, measurements=measurements)
