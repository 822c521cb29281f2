"""HTTP with clients that are slow on purpose: uvicorn's protocol, and clocks for what it waits for without end."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from omnifp4.serve.settings import Limits

SPARE_CONNECTIONS: Final = 64
"""Above the limit, so that who asks is told that it is reached."""


class BoundedProtocol(H11Protocol):
    """Closes connections above the limit, those whose headers do not come, and those that take nothing of what is written to them."""

    limits = Limits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections + SPARE_CONNECTIONS:
            # uvicorn answers 503 above the limit, but only those who ask: who is silent would be kept.
            transport.abort()
            return
        self._header_timer = self.loop.call_later(self.limits.header_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_header_timer()
        elif self._awaits_headers and self._header_timer is None and not self.transport.is_closing():
            # The beginning of another request on a connection that is kept open.
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    @property
    def _awaits_headers(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def protocol_for(limits: Limits) -> type[BoundedProtocol]:
    """The protocol class with a server's own limits; uvicorn makes one object of it for each connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
