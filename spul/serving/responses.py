"""Answers as HTTP: in time, while the client is there, as a whole or as a stream; errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from .answers import Answer, Piece
from .errors import ApiError
from .requests import ChatRequest

POLL_SECONDS = 0.2  # how often a request that waits looks whether its client is still there
READ_SECONDS = 5.0  # how long after its deadline a stream may still be read, with the error that ends it


async def in_time(awaitable: Any, deadline: float) -> Any:
    """The awaited result, or a 504 at the deadline."""
    try:
        return await asyncio.wait_for(awaitable, max(deadline - time.monotonic(), 0.0))
    except asyncio.TimeoutError:
        raise ApiError(504, "the answer took too long; ask for fewer tokens, or try later.") from None


async def while_connected(http: Request, awaitable: Any) -> Any:
    """The awaited result; the task is cancelled once the client has gone."""
    task = asyncio.ensure_future(awaitable)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=POLL_SECONDS)
            if not task.done() and await http.is_disconnected():
                raise ApiError(499, "the client has gone.")
        return task.result()
    finally:
        while not task.done():  # of one cancellation, wait_for of Python 3.11 may make a result
            task.cancel()
            await asyncio.wait({task}, timeout=POLL_SECONDS)


async def whole(answer: Answer, first: Piece, pieces: AsyncGenerator[Piece, None]) -> JSONResponse:
    async with aclosing(pieces):
        found = [first, *([piece async for piece in pieces] if first.finish_reason is None else ())]
    return JSONResponse(answer.whole("".join(piece.text for piece in found), found[-1]))


async def stream(
    request: ChatRequest, answer: Answer, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    """Server-sent events; an answer that fails ends in an error."""
    piece, is_first = first, True
    async with aclosing(pieces):
        try:
            while True:
                yield _event(answer.chunk(piece, is_first))
                if piece.finish_reason is not None:
                    break
                piece, is_first = await anext(pieces), False
        except ApiError as error:
            yield _event(error.body())
            return
    if request.include_usage:
        yield _event(answer.usage_chunk(piece))
    yield "data: [DONE]\n\n"


class TimedStream(StreamingResponse):
    """Server-sent events that end at a deadline also where their reader takes nothing, who would keep its place.

    Args:
        events: the events, an async generator, which itself ends at the deadline.
        deadline: of the request, by the monotonic clock.
    """

    def __init__(self, events: AsyncGenerator[str, None], deadline: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.events, self.deadline = events, deadline

    async def stream_response(self, send: Any) -> None:
        """Send the events; the connection is closed where they are not read in time."""
        left = max(self.deadline - time.monotonic(), 0.0) + READ_SECONDS
        try:
            await asyncio.wait_for(super().stream_response(send), left)
        except asyncio.TimeoutError:
            await self.events.aclose()


def _event(body: dict[str, Any]) -> str:
    """A server-sent event, in ASCII: some clients end a line at other characters than a line feed."""
    return f"data: {json.dumps(body)}\n\n"


def api_error(http: Request, error: Any) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers=headers)


def http_error(http: Request, error: Any) -> JSONResponse:
    said = {404: "there is no such endpoint.", 405: "the endpoint does not take this method."}
    message = said.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers=error.headers)


def unexpected(http: Request, error: Exception) -> JSONResponse:
    return JSONResponse(ApiError(500, "the request failed.").body(), 500)
