"""Reading the beginning of files on the Hub, and telling in one line why that failed.

Requests go through huggingface_hub's own session, so that its proxies, certificates, token and endpoint hold. That
session is of requests, httpx or httpx2, depending on the version; what differs between them ends in this file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from omnifp4.checkpoint.folder import JSON_LIMIT_BYTES
from omnifp4.checkpoint.header import LENGTH_BYTES, TensorEntry, header_length, parse_header, strict_json
from omnifp4.errors import CheckpointError

FIRST_BYTES: Final = 512 * 1024
"""What is asked of a shard first. The headers of the 15 shards of the 30B model have 200 to 300 kB each."""

CHUNK_BYTES: Final = 64 * 1024
RETRY_WAITS_S: Final = (0.5, 2.0)
LONGEST_WAIT_S: Final = 5.0
"""A server that asks for more patience than this is not asked again."""

TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class CutShortError(Exception):
    """A response ended before the bytes that it promised."""


def hub_utils() -> Any:
    """``huggingface_hub.utils``, which exports by a table that type checkers do not see."""
    from huggingface_hub import utils

    return utils


def hub_headers() -> dict[str, str]:
    """Headers with the user's token, if there is one."""
    return {**hub_utils().build_hf_headers(library_name="omnifp4"), "Accept-Encoding": "identity"}


def timeout_s() -> float:
    """Seconds without a byte after which a request is given up: HF_HUB_DOWNLOAD_TIMEOUT."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


@dataclass(frozen=True)
class HubFiles:
    """The files of a repository at one commit.

    Attributes:
        repository: ``org/name``.
        commit: full hash.
        headers: of each request.
    """

    repository: str
    commit: str
    headers: dict[str, str] = field(default_factory=hub_headers, repr=False)

    @property
    def location(self) -> str:
        return f"hub:{self.repository}@{self.commit}"

    def read_json(self, name: str) -> Any:
        """A small JSON file, parsed strictly."""
        subject = f"{self.location}/{name}"

        def read() -> bytes:
            with self._get(name) as body:
                if (body.file_bytes or 0) <= JSON_LIMIT_BYTES:
                    content = body.read(JSON_LIMIT_BYTES + 1, or_less=body.file_bytes is None)
                    if len(content) <= JSON_LIMIT_BYTES:
                        return content
                raise CheckpointError(f"{subject}: more than {JSON_LIMIT_BYTES} bytes of JSON are absurd")

        content = retrying(read, subject)
        try:
            return strict_json(content.decode("utf-8"), subject)
        except UnicodeDecodeError:
            raise CheckpointError(f"{subject}: not UTF-8") from None

    def read_shard_header(self, name: str) -> tuple[list[TensorEntry], dict[str, str], int]:
        """Entries, metadata and file size of a shard, of which no more than the header is read."""
        subject = f"{self.location}/{name}"

        def read() -> tuple[bytes, int]:
            with self._get(name, 0, FIRST_BYTES) as body:
                if body.file_bytes is None:
                    raise CheckpointError(f"{subject}: the server does not tell its size")
                file_bytes = body.file_bytes
                length = header_length(body.read(min(LENGTH_BYTES, file_bytes)), file_bytes, subject)
                raw = body.read(min(length, body.left))
            if len(raw) < length:
                begin = LENGTH_BYTES + len(raw)
                with self._get(name, begin, length - len(raw)) as body:
                    if body.file_bytes != file_bytes or body.begin != begin:
                        raise CheckpointError(f"{subject}: the server answers ranges inconsistently")
                    raw += body.read(length - len(raw))
            return raw, file_bytes

        raw, file_bytes = retrying(read, subject)
        entries, metadata = parse_header(raw, name, file_bytes, subject)
        return entries, metadata, file_bytes

    @contextmanager
    def _get(self, name: str, begin: int = 0, count: int | None = None) -> Iterator[_Body]:
        """Begin to read a file, or `count` of its bytes; what is not read until the end is not transferred."""
        from huggingface_hub import constants, hf_hub_url

        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=constants.ENDPOINT)
        headers = dict(self.headers)
        if count is not None:
            headers["Range"] = f"bytes={begin}-{begin + count - 1}"
        with _streamed(url, headers) as (response, chunks):
            if response.status_code == 416:
                raise CheckpointError(f"{self.location}/{name}: truncated, it has no byte {begin}")
            hub_utils().hf_raise_for_status(response)
            yield _Body.of(response, chunks, begin if count is not None else 0, f"{self.location}/{name}")


class _Body:
    """The bytes of a response, read once and in order."""

    def __init__(self, chunks: Iterator[bytes], begin: int, left: int | None, file_bytes: int | None) -> None:
        self.begin, self.file_bytes = begin, file_bytes
        self._left, self._chunks, self._buffer = left, chunks, bytearray()

    @classmethod
    def of(cls, response: Any, chunks: Iterator[bytes], asked: int, subject: str) -> _Body:
        """Read what the response says of itself; a server that ignores ranges begins at the file's first byte."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError(f"{subject}: the server compresses it unasked")
        length = headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        if response.status_code != 206:
            return cls(chunks, 0, size, size)
        match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is None:
            raise CheckpointError(f"{subject}: the server does not tell which range it sends")
        begin, last, total = (int(group) for group in match.groups())
        if begin != asked or not begin <= last < total:
            raise CheckpointError(f"{subject}: the server sends another range than asked for")
        return cls(chunks, begin, last + 1 - begin, total)

    @property
    def left(self) -> int:
        """Bytes still to be read; a huge number if the server does not tell."""
        return self._left if self._left is not None else 1 << 62

    def read(self, count: int, *, or_less: bool = False) -> bytes:
        """Exactly `count` bytes, or all that are left if these are fewer; CutShortError if the response ends early."""
        count = min(count, self.left)
        while len(self._buffer) < count:
            chunk = next(self._chunks, b"")
            if not chunk:
                if or_less:
                    break
                raise CutShortError(f"the response ends {count - len(self._buffer)} bytes early")
            self._buffer += chunk
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        if self._left is not None:
            self._left -= len(data)
        return data


@contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    session = hub_utils().get_session()
    if callable(getattr(session, "stream", None)):
        with session.stream("GET", url, headers=headers, timeout=timeout_s(), follow_redirects=True) as response:
            yield response, response.iter_raw(CHUNK_BYTES)
    else:  # of requests, before huggingface_hub 1.0
        response = session.get(url, headers=headers, timeout=timeout_s(), stream=True, allow_redirects=True)
        try:
            yield response, response.iter_content(CHUNK_BYTES)
        finally:
            response.close()


def transport_error() -> type[Exception]:
    """The base of what huggingface_hub's HTTP library raises."""
    from huggingface_hub.errors import HfHubHTTPError

    foreign = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] not in OWN_MODULES]
    return foreign[-1]


OWN_MODULES: Final = ("builtins", "huggingface_hub")


Result = TypeVar("Result")


def retrying(read: Callable[[], Result], subject: str) -> Result:
    """Call `read` until it succeeds, fails for good, or has failed too often."""
    for wait in (*RETRY_WAITS_S, None):
        try:
            return read()
        except (CutShortError, transport_error()) as error:
            asked = retry_after_s(error)
            status = status_of(error)
            is_passing = status is None or status in TRANSIENT
            if wait is None or not is_passing or (asked or 0) > LONGEST_WAIT_S:
                if isinstance(error, CutShortError):
                    raise CheckpointError(f"{subject}: truncated, {error}", hint="try again") from None
                raise
            time.sleep(max(wait, asked or 0.0))
    raise AssertionError("unreachable")


def status_of(error: BaseException) -> int | None:
    """HTTP status that an error reports; None if there was no answer."""
    response = getattr(error, "response", None)
    return int(response.status_code) if response is not None else None


def retry_after_s(error: BaseException) -> float | None:
    """Seconds that the server asks to wait."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.isdecimal() else None


@contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a CheckpointError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    subject = f"hub:{repository}" + (f"@{revision}" if revision else "")
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, CutShortError, transport_error(), ConnectionError) as error:
        # What the local cache lacks was looked for there because the Hub did not answer, or refused.
        for failure in (error, error.__cause__):
            if isinstance(failure, HfHubHTTPError) and status_of(failure) is not None:
                raise _refused(failure, subject, repository) from None
        raise _unreachable(error.__cause__ or error, subject) from None
    except HFValidationError as error:
        raise CheckpointError(f"{subject}: no valid Hub id: {error}") from None


def _refused(error: Any, subject: str, repository: str) -> CheckpointError:
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, page = status_of(error), f"{constants.ENDPOINT}/{repository}"
    url = str(getattr(getattr(error, "response", None), "url", page)).partition("?")[0]
    if isinstance(error, GatedRepoError) or status == 403:
        return CheckpointError(
            f"{subject}: gated, and access is not granted (HTTP {status})",
            hint=f"accept its terms at {page}, then set HF_TOKEN or run hf auth login",
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{subject}: no such revision", hint=f"see {page}/tree/main for those that exist")
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(f"{subject}: no such file: {url}")
    if status in {401, 404}:
        return CheckpointError(
            f"{subject}: not found at {constants.ENDPOINT}, or private (HTTP {status}); nor is there a local folder "
            f"{repository}",
            hint="check the name; for a private or gated model set HF_TOKEN",
        )
    if status == 429:
        wait = retry_after_s(error)
        return CheckpointError(
            f"{subject}: the Hub limits the rate of requests (HTTP 429)",
            hint=f"try again{f' in {wait:.0f} s' if wait else ' later'}; with HF_TOKEN set the limit is higher",
        )
    return CheckpointError(f"{subject}: the Hub answers HTTP {status} to {url}", hint="try again later")


def _unreachable(error: BaseException, subject: str) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"{subject}: {constants.ENDPOINT} cannot be reached: {type(error).__name__}: {error}",
        hint="check the network and HF_ENDPOINT, or give a local folder; HF_HUB_OFFLINE=1 uses the local cache alone",
    )
