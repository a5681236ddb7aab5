"""The HTTP server: OpenAI's API in front of an engine, health, and prompts that come and go."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .answers import Answer, Piece
from .encoding import RequestEncoder
from .engine import Engine, Job
from .requests import ApiError, ChatRequest, Limits, check_header_text, read_body, read_json
from .responses import api_error, http_error, in_time, stream, unexpected, while_connected, whole
from .served import ServedPrompts

logger = logging.getLogger(__name__)

T = TypeVar("T")
Record = Callable[[dict[str, Any]], Any]
"""Takes an event, fields of a `LedgerEvent`: of a prompt that is `served`, `stopped` or `revoked`, or of an answer."""
Check = Callable[[str, str | None], Any]
"""Takes name and SHA-256 of a prompt that is to be added, and raises ValueError if it must not be served."""
Revoked = Callable[[], Mapping[str, str]]
"""Since when each request is revoked that is so now, by its name; whoever else revokes one is heard so."""
SHORTEST_TOKEN = 16  # characters of the administrator's token


def make_app(
    engine: Engine,
    model: str,
    limits: Limits | None = None,
    record: Record | None = None,
    admin_token: str | None = None,
    check: Check | None = None,
    revoked: Revoked | None = None,
) -> FastAPI:
    """The server of an engine.

    Args:
        engine: answers requests; started and stopped with the server.
        model: the model's name, which requests give.
        limits: of requests.
        record: takes events, one at a time. A request whose entry cannot be recorded fails.
        admin_token: lets its holder list, add and revoke prompts; without one there is no such endpoint.
        check: asked before a prompt is added, such as whether the ledger says that it was revoked.
        revoked: asked before each answer; prompts of requests that it names are withdrawn. Where it raises OSError or
            ValueError, nothing is answered.

    Raises:
        ValueError: if the token is shorter than 16 characters, or has some that no header takes.
    """
    if admin_token is not None:
        check_header_text(admin_token, "the administrator's token", SHORTEST_TOKEN)
    server = _Server(engine, model, Limits() if limits is None else limits, record, admin_token, check, revoked)
    app = FastAPI(title="spul", docs_url=None, redoc_url=None, openapi_url=None, lifespan=server.lifespan)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_api_route("/v1/completions", server.completion, methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", server.model_card, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    if admin_token is not None:
        app.add_api_route("/admin/prompts", server.prompts, methods=["GET"])
        app.add_api_route("/admin/prompts", server.add, methods=["POST"])
        app.add_api_route("/admin/prompts/{name}", server.revoke, methods=["DELETE"])
    return app


class _Server:
    """The endpoints, and what they share."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        limits: Limits,
        record: Record | None,
        admin_token: str | None,
        check: Check | None,
        revoked: Revoked | None,
    ) -> None:
        self.engine, self.model, self.limits = engine, model, limits
        self.encoder = RequestEncoder(engine.served, limits)
        self.created, self.num_in_flight, self._num_encoding = int(time.time()), 0, 0
        self._record, self._token, self._check, self._revoked = record, admin_token, check, revoked
        self._changing = asyncio.Lock()  # one change of the prompts at a time, its entry included
        self._encoding = ThreadPoolExecutor(1, "spul-encoding")  # long texts must not hold up the others' answers
        self._recording = ThreadPoolExecutor(1, "spul-record")  # in order

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the engine; at the end answer what waits, and record what was served."""
        for one in self.engine.served.served.values():
            await self._recorded("served", one)
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.stop()
            try:
                await self._all_recorded("stopped", self.engine.served.served.values())
            finally:
                self._encoding.shutdown()
                self._recording.shutdown()

    # ---- OpenAI's API ----

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answer("chat", request)

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._answer("completion", request)

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self._card()]}

    async def model_card(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/{name}`."""
        if name != self.model:
            raise ApiError(
                404, f"there is no model of this name; expected {self.model!r}.", "model", "model_not_found"
            )
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "spul"}

    async def health(self) -> JSONResponse:
        """`GET /health`: numbers alone, since names may tell what prompts are for; 503 where nothing is answered."""
        served, status = self.engine.served, "ok" if self.engine.is_alive else "stopping"
        if status == "ok":
            try:
                await in_time(self._to_withdraw(), time.monotonic() + self.limits.timeout)
            except ApiError:  # logged
                status = "ledger unreadable"
        found = {
            "status": status,
            "engine": self.engine.name,
            "prompts": len(served.served),
            "revoked": len(served.revoked),
            "gate_failures": served.gate_failures,
            "in_flight": self.num_in_flight,
            "waiting": self.engine.num_waiting,
        }
        return JSONResponse(found, 200 if status == "ok" else 503)

    async def _answer(self, kind: str, http: Request) -> Response:
        deadline = time.monotonic() + self.limits.timeout
        body = await in_time(self._body(http), deadline)
        request = read_body(kind, body, self.model, self.limits)
        await self._withdraw_revoked(deadline)
        job = await self._encoded(request, deadline)
        answer = Answer(kind, self.model, len(job.token_ids))
        pieces = self._pieces(job, answer, deadline)
        first = await while_connected(http, anext(pieces))  # a refusal has its own status also in a stream
        if not request.stream:
            return await while_connected(http, whole(answer, first, pieces))
        events = stream(request, answer, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _body(self, http: Request) -> bytes:
        most, found = self.limits.max_body_bytes, bytearray()
        try:
            async for chunk in http.stream():
                found += chunk
                if len(found) > most:
                    raise ApiError(413, f"the body has more than {most} bytes.")
        except ClientDisconnect:
            raise ApiError(499, "the client has gone.") from None
        return bytes(found)

    async def _encoded(self, request: ChatRequest, deadline: float) -> Job:
        """The request as the engine takes it; no more wait to be encoded than may wait for the engine."""
        if self._num_encoding >= self.limits.max_batch + self.limits.max_waiting:
            raise ApiError(429, "too many requests wait; try later.", code="rate_limit_exceeded")
        self._num_encoding += 1
        try:
            loop = asyncio.get_running_loop()
            job: Job = await in_time(loop.run_in_executor(self._encoding, self.encoder.job, request), deadline)
            return job
        finally:
            self._num_encoding -= 1

    async def _pieces(self, job: Job, answer: Answer, deadline: float) -> AsyncGenerator[Piece, None]:
        """The parts of an answer, in time; the last once the entry of the request is recorded."""
        last, status = Piece("", 0), "abandoned"
        self.num_in_flight += 1
        try:
            async with aclosing(self.engine.answer(job)) as pieces:
                while last.finish_reason is None:
                    last = await in_time(anext(pieces), deadline)
                    if last.finish_reason is None:
                        yield last
            status = last.finish_reason
        except ApiError as error:
            status = f"error {error.status}"
            raise
        except Exception:
            status = "error 500"
            raise
        finally:
            self.num_in_flight -= 1
            entry = self._submit("answered", job, answer, last, status) if job.prompt is not None else None
        if entry is not None:
            await entry
        yield last

    # ---- what is recorded ----

    def _submit(self, event: str, job: Job, answer: Answer, last: Piece, status: str) -> asyncio.Future | None:
        """Hand over the entry of a request; also of one whose client has gone, who waits for nothing."""
        prompt = job.prompt or {}
        return self._hand_over(
            {
                "event": event,
                "request": prompt.get("name"),
                **{name: prompt.get(name) for name in ("adapter", "prompt_sha256", "gate")},
                "base_fingerprint": self.engine.served.base_fingerprint,
                "answer": answer.id,
                "finish": status,
                "prompt_tokens": len(job.token_ids),
                "completion_tokens": last.num_tokens,
            }
        )

    async def _recorded(self, event: str, one: dict[str, Any]) -> None:
        """Record an event of a prompt."""
        named = {name: one[name] for name in ("adapter", "prompt_sha256", "base_fingerprint", "gate")}
        entry = self._hand_over({"event": event, "request": one["name"], **named})
        if entry is not None:
            await entry

    async def _all_recorded(self, event: str, some: Iterable[dict[str, Any]]) -> None:
        """Record an event of several prompts; one whose entry cannot be written keeps none of the others out."""
        found = [await _error_of(self._recorded(event, one)) for one in some]
        if errors := [one for one in found if one is not None]:
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

        future = asyncio.get_running_loop().run_in_executor(self._recording, recorded)
        future.add_done_callback(lambda one: one.cancelled() or one.exception())  # logged above
        return future

    # ---- prompts that come and go ----

    async def prompts(self, http: Request) -> dict[str, Any]:
        """`GET /admin/prompts`."""
        self._check_admin(http)
        await self._withdraw_revoked(time.monotonic() + self.limits.timeout)
        return {"served": list(self.engine.served.served.values()), "revoked": self.engine.served.revoked}

    async def add(self, http: Request) -> JSONResponse:
        """`POST /admin/prompts`: `{"name": ..., "folder": ..., "always": false}`."""
        self._check_admin(http)
        data = read_json(await in_time(self._body(http), time.monotonic() + self.limits.timeout))
        if unknown := sorted(set(data) - {"name", "folder", "always"}):
            raise ApiError(
                400, f"the field {unknown[0]!r} is not known; expected name, folder and always.", unknown[0]
            )

        name, folder, is_always = data.get("name"), data.get("folder"), data.get("always", False)
        async with self._changing:
            if (check := self._check) is not None:
                await asyncio.to_thread(_checked, check, self.engine.served, name, folder)
            added = await self.engine.change(lambda served: served.add(name, folder, is_always))
            try:
                await self._recorded("served", added)
            except ApiError:  # what is not in the record is not served
                await self.engine.change(lambda served: served.revoke(added["name"]))
                raise ApiError(500, "the prompt was not added, since that could not be recorded.") from None
        return JSONResponse(added, 201)

    async def revoke(self, name: str, http: Request) -> dict[str, Any]:
        """`DELETE /admin/prompts/{name}`: requests that are being answered keep the prompt, later ones are without."""
        self._check_admin(http)
        async with self._changing:
            gone = await self.engine.change(lambda served: served.revoke(name))
            try:
                await self._all_recorded("revoked", gone)
            except ApiError:
                raise ApiError(500, "the prompt was revoked, and that could not be recorded.") from None
        return {"revoked": gone}

    async def _withdraw_revoked(self, deadline: float) -> None:
        """Take off prompts of requests that somebody else has revoked; each is logged, and recorded as stopped.

        Only the look has a deadline, since it waits for entries that are written: a change is never left half done.
        """
        if not await in_time(self._to_withdraw(), deadline):
            return
        async with self._changing:
            for name, since in (await self._to_withdraw()).items():  # anew: one may have been added again meanwhile
                if name not in self.engine.served.served:  # one of several went with its part
                    continue
                gone = await self.engine.change(partial(ServedPrompts.revoke, name=name))
                names = ", ".join(repr(one["name"]) for one in gone)
                logger.warning("No longer served: %s, since the request %r was revoked on %s.", names, name, since)
                await self._all_recorded("stopped", gone)

    async def _to_withdraw(self) -> dict[str, str]:
        """Since when requests are revoked whose prompts are served."""
        if self._revoked is None:
            return {}
        try:  # in the thread that writes, so that no line is read while it is written here
            found = await asyncio.get_running_loop().run_in_executor(self._recording, self._revoked)
        except (OSError, ValueError) as error:
            logger.exception("Whether prompts were revoked is not known")
            raise ApiError(500, "the record of revoked prompts could not be read.") from error
        return {name: found[name] for name in self.engine.served.served if name in found}

    def _check_admin(self, http: Request) -> None:
        given = http.headers.get("authorization", "").encode()
        if self._token is None or not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise ApiError(401, "the administrator's token is missing or wrong.", code="invalid_api_key")


def _checked(check: Check, served: ServedPrompts, name: Any, folder: Any) -> None:
    prompt_sha256 = served.weights_of(name, folder)
    try:
        check(name, prompt_sha256)
    except ValueError as error:
        raise ApiError(400, f"the prompt was not added: {error}", "name") from error


async def _error_of(awaitable: Awaitable[Any]) -> ApiError | None:
    try:
        await awaitable
    except ApiError as error:
        return error
    return None
