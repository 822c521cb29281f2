"""Reading bodies: as much as is allowed, from one client and from all together, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.datastructures import Headers

from omnifp4.serve.errors import ApiError, bad_request, overloaded
from omnifp4.serve.listening import ClientGoneError
from omnifp4.serve.settings import Limits

JSON_TYPE: Final = "application/json"


class Bodies:
    """The bodies of all requests that are being read or prepared."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, headers: Headers, receive: Callable[[], Awaitable[Any]]) -> AsyncIterator[bytes]:
        """A body, counted as long as the context is open.

        Raises:
            ApiError: not JSON by its content type (415), too large (413), too slow (408), or too much at once (503).
        """
        if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON_TYPE:
            # A form of another site's page can send anything but this without being asked first.
            raise ApiError(415, f"the content type must be {JSON_TYPE}", code="unsupported_media_type")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not read", code="unsupported_media_type")
        stated = headers.get("content-length", "")
        if stated.isdigit() and int(stated) > self._limits.body_bytes:
            raise self._too_large()
        held = 0
        try:
            data = bytearray()
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGoneError
                        piece = message.get("body", b"")
                        more = message.get("more_body", False)
                        held += len(piece)
                        self._held += len(piece)
                        if held > self._limits.body_bytes:
                            raise self._too_large()
                        if self._held > self._limits.bodies_bytes:
                            raise overloaded("the server is reading as much as it can hold; try again later")
                        data += piece
            except TimeoutError:
                raise ApiError(
                    408, f"the body was not complete after {self._limits.body_seconds:g} s", code="timeout"
                ) from None
            if not data:
                raise bad_request("the body is empty")
            body = bytes(data)
            data.clear()
            yield body
        finally:
            self._held -= held

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is above the limit of {self._limits.body_bytes:,} bytes", code="too_large")
