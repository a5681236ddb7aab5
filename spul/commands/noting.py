"""The request that a command works for, and the entry that its ledger gets in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..records.ledger import Ledger


@dataclass(frozen=True)
class RequestAtWork:
    """A request for which something is made, as its ledger had it when the work began.

    Args:
        ledger: the ledger that gets an entry of what is made.
        request: the request's name.
        revocations: how often it had been revoked.
    """

    ledger: Ledger
    request: str
    revocations: int

    def check_stands(self) -> None:
        """Raise if the request is revoked.

        A run that is resumed may have begun before it was, and would make it one again.

        Raises:
            ValueError: if it is.
        """
        from ..records.ledger_withdrawn import command

        state = self.ledger.states().get(self.request) if self.ledger.path.exists() else None
        if state is not None and state.revoked is not None:
            raise ValueError(
                f"the request {self.request!r} was revoked on {state.revoked} by the ledger "
                f"{str(self.ledger.path)!r}, maybe since the run began that is to be resumed. If it is to be one "
                f"again, note that first: {command(self.ledger.path, 'received', self.request)}"
            )

    def note_trained(self, folder: str) -> None:
        """Note what was trained, or a refusal that was made; call it last, when all else has been said.

        Args:
            folder: where it is saved.

        Raises:
            ValueError: if the request was revoked since the work began, or the ledger was damaged.
        """
        from ..records.ledger_events import LedgerEvent

        event = LedgerEvent.of_adapter("trained", self.request, folder)
        try:
            self.ledger.append(event, self.revocations)
        except ValueError as error:
            raise ValueError(f"{folder} is saved, but not noted: {error}") from error


def ledger_for(path: str | None, request: str | None) -> RequestAtWork | None:
    """The request that something is made for, and the ledger that gets an entry of it; None without one.

    Args:
        path: its file.
        request: the request's name.

    Raises:
        FileNotFoundError: if the file's folder does not exist.
        ValueError: if one of both is not given, no prompt can be served by the name, or the ledger is damaged.
    """
    from ..records.ledger import Ledger
    from ..records.ledger_events import LedgerEvent

    if path is None and request is None:
        return None
    if path is None or request is None:
        raise ValueError(
            "--ledger and --request go together: the file, and the name of the request that is noted in it."
        )
    LedgerEvent("trained", request).to_dict()
    ledger = Ledger(path)
    ledger.check_goes_on()
    ledger.check_name(request)
    return RequestAtWork(ledger, request, ledger.revocations(request))
