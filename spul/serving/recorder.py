"""Events of a server, recorded in order, and what the ledger says of the prompts that it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ..records.ledger_states import RequestState
from .answers import Answer, Piece
from .engine import Job
from .errors import ApiError
from .served import REFUSAL, ServedPrompts

logger = logging.getLogger(__name__)

Record = Callable[[dict[str, Any]], Any]
"""Takes an event, fields of a `LedgerEvent`: of a prompt that is `served`, `stopped` or `revoked`, or of an answer."""
States = Callable[[], Mapping[str, RequestState]]
"""The requests of the ledger as they are now, by name; whoever else revokes one, or takes it back, is heard so."""
_OF_PROMPT = ("adapter", "prompt_sha256", "gate")


class Standing(NamedTuple):
    """Where the ledger and the prompts that are served differ.

    Attributes:
        revoked: since when requests are revoked whose prompts are served, or would be with their parts, by name.
        reopened: requests whose prompts were withheld, and that were received anew since.
        replaced: those that were trained anew since, as other weights, by their SHA-256; None where no entry says.
    """

    revoked: dict[str, str]
    reopened: list[str]
    replaced: dict[str, str | None]


class Recorder:
    """Records events, and looks into the ledger, in one thread: in order, and no entry is read while it is written.

    Args:
        served: the prompts.
        record: takes events; None to record nothing.
        states: the requests of the ledger; None without one.
        server: name of this server in events of prompts.
    """

    def __init__(
        self, served: ServedPrompts, record: Record | None, states: States | None, server: str | None
    ) -> None:
        self.served, self.server = served, server
        self._record, self._states = record, states
        self._before: dict[str, int] = {}  # of each prompt, the times its request was revoked before it was served
        self._thread = ThreadPoolExecutor(1, "spul-record")

    # ---- what is recorded ----

    def answered(self, job: Job, answer: Answer, last: Piece, status: str) -> asyncio.Future | None:
        """Hand over the entry of a request; also of one whose client has gone, who waits for nothing."""
        prompt = job.prompt or {}
        return self._hand_over(
            {
                "event": "answered",
                "request": prompt.get("name"),
                **{name: prompt.get(name) for name in _OF_PROMPT},
                "base_fingerprint": self.served.base_fingerprint,
                "answer": answer.id,
                "finish": status,
                "prompt_tokens": len(job.token_ids),
                "completion_tokens": last.num_tokens,
            }
        )

    async def of_prompt(self, event: str, one: dict[str, Any]) -> None:
        """Record an event of a prompt.

        Raises:
            ApiError: 500 if it cannot be recorded.
        """
        named = {name: one[name] for name in (*_OF_PROMPT, "base_fingerprint")}
        entry = self._hand_over({"event": event, "request": one["name"], **named, "server": self.server})
        if entry is not None:
            await entry

    async def of_prompts(self, event: str, some: Iterable[dict[str, Any]]) -> None:
        """Record an event of several prompts; one whose entry cannot be written keeps none of the others out."""
        errors = []
        for one in some:
            try:
                await self.of_prompt(event, one)
            except ApiError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _hand_over(self, event: dict[str, Any]) -> asyncio.Future | None:
        if self._record is None:
            return None
        record = self._record

        def recorded() -> None:
            try:
                record(event)
            except Exception as error:
                logger.exception("An event was not recorded: %s", event["event"])
                raise ApiError(500, "the request could not be recorded.") from error

        future = asyncio.get_running_loop().run_in_executor(self._thread, recorded)
        future.add_done_callback(lambda one: one.cancelled() or one.exception())  # logged above
        return future

    def shutdown(self) -> None:
        """Wait for the last entry."""
        self._thread.shutdown()

    # ---- what the ledger says ----

    async def take(self, names: Collection[str]) -> None:
        """Note that prompts are served from now on, whatever happened to their requests before.

        Raises:
            ApiError: 500 if the ledger cannot be read.
        """
        if self._states is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._take, names)

    async def standing(self) -> Standing:
        """Where the ledger and the prompts that are served differ.

        Raises:
            ApiError: 500 if the ledger cannot be read.
        """
        if self._states is None:
            return Standing({}, [], {})
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._standing)

    def withdrawn(self) -> Collection[str]:
        """Names of prompts that must not be served, for the engine's thread; raises as `standing`."""
        return () if self._states is None else self._thread.submit(self._standing).result().revoked.keys()

    def _take(self, names: Collection[str]) -> None:
        states = self._read()
        for name in names:
            if (state := states.get(name)) is not None:
                self._before[name] = len(state.revocations) - (state.revoked is not None)

    def _standing(self) -> Standing:
        states = self._read()
        # A combined prompt that is idle would come back with its parts: what became of its request counts, too.
        able = [*self.served.served, *self.served.idle]
        known = {name: states[name] for name in [*able, *self.served.withheld] if name in states}
        revoked = {
            name: known[name].revocations[-1]
            for name in able
            if name in known and len(known[name].revocations) > self._before.get(name, 0)
        }
        again = {name: one for name, one in self.served.withheld.items() if name in known and not known[name].revoked}
        replaced = {
            name: known[name].retrained
            for name, one in again.items()
            if one["kind"] != REFUSAL and known[name].is_replaced(one["prompt_sha256"])  # a refusal has no weights
        }
        return Standing(revoked, [name for name in again if name not in replaced], replaced)

    def _read(self) -> Mapping[str, RequestState]:
        assert self._states is not None
        try:
            return self._states()
        except (OSError, ValueError) as error:
            logger.exception("Whether prompts were revoked is not known")
            raise ApiError(500, "the record of revoked prompts could not be read.") from error
