"""The HTTP server: OpenAI's API in front of an engine, health, and prompts that come and go."""

from __future__ import annotations

import asyncio
import hmac
import logging
import shlex
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..records.ledger_events import check_server
from .answers import Answer, Piece
from .encoding import RequestEncoder
from .engine import Engine, Job
from .errors import ApiError, other_model, too_many
from .recorder import Record, Recorder, States
from .requests import ChatRequest, Limits, check_header_text, read_body, read_json
from .responses import TimedStream, api_error, http_error, in_time, stream, unexpected, while_connected, whole
from .served import ServedPrompts

logger = logging.getLogger(__name__)

Check = Callable[[str, str | None, bool], Any]
"""Takes name and SHA-256 of a prompt that is to be added, and whether it has weights, which a fixed refusal has not;
raises ValueError if it must not be served."""
SHORTEST_TOKEN = 16  # characters of the administrator's token


def make_app(
    engine: Engine,
    model: str,
    limits: Limits | None = None,
    record: Record | None = None,
    admin_token: str | None = None,
    check: Check | None = None,
    states: States | None = None,
    server: str | None = None,
) -> FastAPI:
    """The server of an engine.

    Args:
        engine: answers requests; started and stopped with the server.
        model: the model's name, which requests give.
        limits: of requests.
        record: takes events, one at a time. A request whose entry cannot be recorded fails.
        admin_token: lets its holder list, add and revoke prompts; without one there is no such endpoint.
        check: asked before a prompt is added, such as whether the ledger says that it was revoked.
        states: the ledger's requests, asked before each answer: prompts of those that are revoked are taken off, and
            put back once the requests are received anew. Where it raises OSError or ValueError, nothing is answered.
        server: name of this server in events of prompts, as each of several has one.

    Raises:
        ValueError: if the token is shorter than 16 characters, or has some that no header takes, or `server` is empty.
    """
    if server is not None:
        check_server(server)
    if admin_token is not None:
        check_header_text(admin_token, "the administrator's token", SHORTEST_TOKEN)
    recorder = Recorder(engine.served, record, states, server)
    endpoints = _Server(engine, model, Limits() if limits is None else limits, recorder, admin_token, check)
    app = FastAPI(title="spul", docs_url=None, redoc_url=None, openapi_url=None, lifespan=endpoints.lifespan)
    app.state.served = engine.served
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
    app.add_api_route("/v1/chat/completions", endpoints.chat, methods=["POST"])
    app.add_api_route("/v1/completions", endpoints.completion, methods=["POST"])
    app.add_api_route("/v1/models", endpoints.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", endpoints.model_card, methods=["GET"])
    app.add_api_route("/health", endpoints.health, methods=["GET"])
    if admin_token is not None:
        app.add_api_route("/admin/prompts", endpoints.prompts, methods=["GET"])
        app.add_api_route("/admin/prompts", endpoints.add, methods=["POST"])
        app.add_api_route("/admin/prompts/{name}", endpoints.revoke, methods=["DELETE"])
    return app


class _Server:
    """The endpoints, and what they share."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        limits: Limits,
        recorder: Recorder,
        admin_token: str | None,
        check: Check | None,
    ) -> None:
        self.engine, self.model, self.limits, self.recorder = engine, model, limits, recorder
        engine.served.withdrawn = recorder.withdrawn
        self.encoder = RequestEncoder(engine.served, limits)
        self.created, self.num_in_flight, self._num_encoding = int(time.time()), 0, 0
        self._token, self._check = admin_token, check
        self._told: set[tuple[str, str | None]] = set()  # requests and their new weights, of which was warned
        self._changing = asyncio.Lock()  # one change of the prompts at a time, its entry included
        self._encoding = ThreadPoolExecutor(1, "spul-encoding")  # long texts must not hold up the others' answers

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the engine; at the end answer what waits, and record what was served."""
        await self.recorder.take(self.engine.served.served)
        for one in self.engine.served.served.values():
            await self.recorder.of_prompt("served", one)
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.stop()
            try:
                await self.recorder.of_prompts("stopped", self.engine.served.served.values())
            finally:
                self._encoding.shutdown()
                self.recorder.shutdown()

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
            raise other_model(self.model)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "spul"}

    async def health(self) -> JSONResponse:
        """`GET /health`: numbers alone, since names may tell what prompts are for; 503 where nothing is answered."""
        served, status = self.engine.served, "ok" if self.engine.is_alive else "stopping"
        if status == "ok":
            try:
                await in_time(self.recorder.standing(), time.monotonic() + self.limits.timeout)
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
        await self._follow_ledger(deadline)
        routes = self.engine.served.routes
        job = await self._encoded(request, deadline)
        job.routes = routes  # of the moment in which the ledger was asked
        answer = Answer(kind, self.model, len(job.token_ids))
        pieces = self._pieces(job, answer, deadline)
        first = await while_connected(http, anext(pieces))  # a refusal has its own status also in a stream
        if not request.stream:
            return await while_connected(http, whole(answer, first, pieces))
        return TimedStream(stream(request, answer, first, pieces), deadline)

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
            raise too_many()
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
        except Exception as error:  # a stream, too, ends in an error of the API
            status = "error 500"
            logger.exception("A request failed")
            raise ApiError(500, "the request failed.") from error
        finally:
            self.num_in_flight -= 1
            entry = self.recorder.answered(job, answer, last, status) if job.prompt is not None else None
        if entry is not None:
            await entry
        yield last

    # ---- prompts that come and go ----

    async def prompts(self, http: Request) -> dict[str, Any]:
        """`GET /admin/prompts`."""
        self._check_admin(http)
        await self._follow_ledger(time.monotonic() + self.limits.timeout)
        served = self.engine.served
        return {"served": [*served.served.values()], "withheld": [*served.withheld], "revoked": served.revoked}

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
                await self.recorder.take([added["name"]])
                await self.recorder.of_prompt("served", added)
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
                await self.recorder.of_prompts("revoked", gone)
            except ApiError:
                raise ApiError(500, "the prompt was revoked, and that could not be recorded.") from None
        return {"revoked": gone}

    async def _follow_ledger(self, deadline: float) -> None:
        """Take off prompts of requests that somebody else has revoked, and put back those that were received anew.

        Each is logged, and recorded as stopped or served. Only the look has a deadline, since it waits for entries
        that are written: a change is never left half done.
        """
        found = await in_time(self.recorder.standing(), deadline)
        if found.revoked or found.reopened:  # a prompt that is being added holds the lock as long as it loads
            async with self._changing:
                found = await self.recorder.standing()  # anew: others may have changed it
                for name, since in found.revoked.items():
                    await self._withhold(name, since)
                found = await self.recorder.standing()
                for name in found.reopened:
                    await self._restore(name)
        self._tell(found.replaced)

    def _tell(self, replaced: Mapping[str, str | None]) -> None:
        """Warn once of each request that was trained anew, whose new prompt has to be added."""
        for name, retrained in replaced.items():
            if (name, retrained) in self._told:
                continue
            what = "as another prompt: add that one"
            if retrained is None:
                what = (
                    "as a prompt whose weights no entry names: add that one, or, if it is the one that is withheld, "
                    f"note so: spul ledger add --ledger FILE --event trained --request {shlex.quote(name)} --adapter "
                    "FOLDER"
                )
            logger.warning("The request %r was trained anew, %s.", name, what)
        self._told = set(replaced.items())

    async def _withhold(self, name: str, since: str) -> None:
        gone = await self.engine.change(partial(ServedPrompts.withhold, name=name))
        if names := ", ".join(repr(one["name"]) for one in gone):
            logger.warning("No longer served: %s, since the request %r was revoked on %s.", names, name, since)
        else:
            logger.warning("Not to be served again with its parts: %r, since it was revoked on %s.", name, since)
        await self.recorder.of_prompts("stopped", gone)

    async def _restore(self, name: str) -> None:
        back = await self.engine.change(partial(ServedPrompts.restore, name=name))
        if names := ", ".join(repr(one["name"]) for one in back):
            logger.warning("Served again: %s, since the request %r is one again.", names, name)
        else:
            logger.warning("To be served again with its parts: %r, since it is a request again.", name)
        try:
            await self.recorder.take({name, *(one["name"] for one in back)})
            await self.recorder.of_prompts("served", back)
        except ApiError:  # what is not in the record is not served
            await self.engine.change(partial(ServedPrompts.withhold, name=name))
            raise

    def _check_admin(self, http: Request) -> None:
        given = http.headers.get("authorization", "").encode()
        if self._token is None or not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise ApiError(401, "the administrator's token is missing or wrong.", code="invalid_api_key")


def _checked(check: Check, served: ServedPrompts, name: Any, folder: Any) -> None:
    prompt_sha256, has_weights = served.weights_of(name, folder)
    try:
        check(name, prompt_sha256, has_weights)
    except ValueError as error:
        raise ApiError(400, f"the prompt was not added: {error}", "name") from error
