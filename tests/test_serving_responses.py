"""Answers as HTTP: whoever waits for nobody ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from spul.serving.errors import ApiError
from spul.serving.responses import while_connected


class Gone:
    """A request whose client has gone."""

    async def is_disconnected(self):
        return True


def test_an_answer_ends_once_its_client_has_gone_although_one_cancellation_is_lost():
    ended = []

    async def answer():
        with suppress(asyncio.CancelledError):  # lost, as in a wait for a piece that comes just then
            await asyncio.sleep(3600)
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def run():
        with pytest.raises(ApiError, match="the client has gone"):
            await while_connected(Gone(), answer())

    asyncio.run(asyncio.wait_for(run(), 60))
    assert ended == [True]
