"""Errors as OpenAI's clients expect them: a status, and an object that says what is wrong."""

from __future__ import annotations

from typing import Any

from omnifp4.chat.errors import ContextError, MediaError
from omnifp4.decoding.engine import DecodingError, EngineFull
from omnifp4.errors import OmniFP4Error


class ApiError(Exception):
    """What a client is told; never more than that."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after`: seconds after which it may go better."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers if self.status != 401 else {**headers, "www-authenticate": "Bearer"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str) -> ApiError:
    """It may be tried again."""
    return ApiError(503, message, kind="server_error", code="overloaded", retry_after=1)


def going_down() -> ApiError:
    """The operator has ended the server."""
    return overloaded("the server is going down")


def too_late(seconds: float) -> ApiError:
    """The answer was not ready in time."""
    return ApiError(504, f"the answer took more than {seconds:g} s", kind="server_error", code="timeout")


def as_api_error(error: BaseException) -> ApiError | None:
    """What a client may know of an error of ours; None: nothing but that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFull):
        return overloaded(str(error))
    if isinstance(error, DecodingError):
        return ApiError(500, str(error), kind="server_error", code="model_error")
    if isinstance(error, ContextError):
        return bad_request(str(error), "messages", "context_length_exceeded")
    if isinstance(error, MediaError):
        return bad_request(str(error), "messages", "invalid_media")
    if isinstance(error, OmniFP4Error):
        return bad_request(str(error))
    if type(error).__name__ == "OutOfMemoryError":
        return overloaded("the answer does not fit into memory now; shorten the conversation or try again later")
    return None


def internal_error() -> ApiError:
    """For all others; the log has the rest."""
    return ApiError(500, "the server failed; its log says how", kind="server_error", code="internal_error")
