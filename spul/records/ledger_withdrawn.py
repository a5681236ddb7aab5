"""Prompts that a ledger keeps from being served, with the reason, and the command that notes otherwise, in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from .ledger_states import RequestState


def command(ledger: Path, event: str, request: str) -> str:
    """The command that notes an event of a request.

    Args:
        ledger: the ledger's file.
        event: the event.
        request: the request's name.
    """
    return f"spul ledger add --ledger {shlex.quote(str(ledger))} --event {event} --request {shlex.quote(request)}"


def why_withdrawn(
    ledger: Path, states: Mapping[str, RequestState], request: str, prompt_sha256: str | None, has_weights: bool
) -> str | None:
    """Why a prompt is not served, and what to do; None if it may be.

    Args:
        ledger: the ledger's file.
        states: its requests by name.
        request, prompt_sha256, has_weights: as of `Ledger.check_not_revoked`.
    """
    own = states.get(request)
    is_replaced = has_weights and own is not None and own.is_replaced(prompt_sha256)
    if own is not None and is_replaced and (prompt_sha256 or own.retrained or own.withdrawn):
        return (
            f"the request {request!r} was revoked on {own.revocations[-1]} by the ledger {str(ledger)!r} and trained "
            f"anew since, {_of_new_weights(ledger, own, prompt_sha256)}"
        )
    if own is not None and own.revoked is not None:
        return (
            f"the request {request!r} was revoked on {own.revoked} by the ledger {str(ledger)!r}: its prompt is not "
            f"served. Leave it out; if it is to be served again, note that first: "
            f"{command(ledger, 'received', request)}"
        )
    if prompt_sha256 is None or (own is not None and prompt_sha256 in own.weights):
        return None
    other = next((one for one in states.values() if one.has_withdrawn(prompt_sha256)), None)
    if other is None:
        return None
    anew = (
        ""
        if other.revoked is None
        else (f"; if that one is to be served again, note that first: {command(ledger, 'received', other.request)}")
    )
    return (
        f"the request {other.request!r} was revoked on {other.revocations[-1]} by the ledger {str(ledger)!r}, and "
        f"{request!r} has the same weights, of SHA-256 {prompt_sha256}: its prompt is not served. Leave it out; if "
        f"they were trained for {request!r}, too, note that first: {command(ledger, 'trained', request)} --adapter "
        f"FOLDER{anew}"
    )


def _of_new_weights(ledger: Path, state: RequestState, prompt_sha256: str | None) -> str:
    """As which prompt a request was trained anew, and what to do with one of these weights, in words."""
    note = f"{command(ledger, 'trained', state.request)} --adapter FOLDER"
    if prompt_sha256 is None:
        return (
            "and this prompt's weights may be those from before: its record lacks their SHA-256 (weights_sha256). "
            "Serve the new one; if this is the new one, save it again, by save_pretrained, which records it, and note "
            f"that: {note}"
        )
    if state.retrained is None:
        return (
            f"by an entry without the SHA-256 of its weights; this prompt has {prompt_sha256}, as the request had "
            f"before. Serve the new one; if this is the new one, note that first: {note}"
        )
    return f"with weights of SHA-256 {state.retrained}; this prompt has {prompt_sha256}. Serve the new one."
