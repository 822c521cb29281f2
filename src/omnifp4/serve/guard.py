"""What every request passes first and every response last: host, key, headers that protect a browser, and a count."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from starlette.responses import JSONResponse

from omnifp4.serve.errors import ApiError, as_api_error, internal_error
from omnifp4.serve.listening import GONE, ClientGoneError
from omnifp4.serve.metrics import Metrics
from omnifp4.serve.settings import Settings

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

log = logging.getLogger("omnifp4.serve")

OPEN_PATHS: Final = ("/", "/page.js", "/page.css", "/health")
"""Reached without the key: the page has to be loaded before it can ask for one, and shows nothing of the model."""

CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

MOST_HEADERS: Final = 100

_HEADERS: Final = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"microphone=(self), camera=(), geolocation=()"),
]


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, routes: Iterable[str]) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._header_bytes = settings.limits.header_bytes
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"no {scope['type']} here")
        status = 0
        complete = False
        read = not _has_body(scope)

        async def watched() -> Any:
            nonlocal read
            message = await receive()
            read = read or not message.get("more_body", False)
            return message

        async def protected(message: Any) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                # An answer before the end of the body: what still comes would have to be read for nothing.
                ending = [] if read and status != 431 else [(b"connection", b"close")]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS, *ending]}
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, watched, protected)
        except ClientGoneError:
            status = GONE
        except Exception as error:
            told = as_api_error(error)
            if told is None:
                told = internal_error()
                # As it would be written in Python: a path may hold line ends, and a log has one line for each event.
                log.error("%s %r failed", scope["method"], scope["path"][:200], exc_info=error)
            if complete:
                return
            if status:
                raise  # too late to tell: this makes uvicorn close the connection
            await JSONResponse(told.body, told.status, told.headers)(scope, watched, protected)
        finally:
            # Only known paths, so that a stranger cannot make a new counter with each request.
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, str(status or GONE)).inc()

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        count = len(scope["headers"])
        if count > MOST_HEADERS or sum(len(name) + len(value) for name, value in scope["headers"]) > self._header_bytes:
            raise ApiError(431, "the headers are above the limit in size or number", code="headers_too_large")
        if b"transfer-encoding" in headers and b"content-length" in headers:
            # A proxy that believes the other one would see another request behind this body.
            raise ApiError(400, "the body has both a length and a transfer encoding", code="ambiguous_length")
        hosts = self._settings.known_hosts
        if hosts is not None and _host_name(headers.get(b"host", b"")) not in hosts:
            raise ApiError(
                403, "this server is not known under that host name (start it with --allow-host)", code="unknown_host"
            )
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
            raise ApiError(403, "pages of other sites may not use this server", code="cross_site")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._key):
                raise ApiError(
                    401,
                    "the API key is missing or wrong (send it as 'Authorization: Bearer KEY')",
                    kind="authentication_error",
                    code="invalid_api_key",
                )


def _has_body(scope: Any) -> bool:
    return any(
        (name == b"content-length" and value != b"0") or name == b"transfer-encoding"
        for name, value in scope["headers"]
    )


def _host_name(header: bytes) -> str:
    """The Host header without its port."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]
