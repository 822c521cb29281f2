"""A job's events to a client that may leave at any moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Final

from starlette.responses import Response

from omnifp4.serve.errors import ApiError, internal_error
from omnifp4.serve.job import Ended, Failed, Job, JobEvent

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

QUIET_SECONDS: Final = 15.0
"""After so long without a piece, a stream says that it is still there."""

GONE: Final = 499
"""The status that is noted where nobody is left to read one."""


class ClientGoneError(Exception):
    """The client closed the connection."""


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def events_of(
    job: Job, receive: Receive, quiet_seconds: float = QUIET_SECONDS
) -> AsyncGenerator[JobEvent | None, None]:
    """All events up to `Ended`; None after each quiet while.

    The job is cancelled when this ends before it does, for whatever reason.

    Raises:
        ApiError: the job failed.
        ClientGoneError: the client left.
    """
    gone = asyncio.ensure_future(until_gone(receive))
    gone.add_done_callback(lambda _: job.mail.wake())
    try:
        while True:
            while job.mail.events:
                event = job.mail.events.popleft()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Ended):
                    return
                yield event
            if gone.done():
                raise ClientGoneError
            began = time.monotonic()
            await job.mail.wait(quiet_seconds)
            if time.monotonic() - began >= quiet_seconds and not job.mail.events:
                yield None
    finally:
        job.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


class PiecesResponse(Response):
    """A body whose length is not known, from pieces that are written as they come."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        on_error: Callable[[ApiError], bytes],
        on_end: Callable[[], object],
    ) -> None:
        """Headers are sent when the first piece is there.

        Args:
            pieces: of the body.
            media_type: of the body.
            on_error: what to write where an error comes after the headers.
            on_end: called once, whatever happens.
        """
        super().__init__(media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._on_error = on_error
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    if not started:
                        started = True
                        await self._start(send)
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ClientGoneError:
            return
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": self._on_error(error), "more_body": True})
        finally:
            self._on_end()
        if not started:
            raise internal_error()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
