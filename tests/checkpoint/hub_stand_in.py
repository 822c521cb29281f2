"""A stand-in for the Hugging Face Hub on 127.0.0.1 that serves folders, counts what it sends, and can misbehave.

It answers what huggingface_hub asks: repository info, the file tree, and HEAD and GET of ``resolve``, with the headers
of the Hub, ranges, and redirects to another path as to the Hub's content delivery network.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK_BYTES = 64 * 1024


class Fault(Enum):
    """What the server does wrong."""

    UNAUTHORIZED = auto()
    GATED = auto()
    RATE_LIMITED = auto()
    UNAVAILABLE = auto()
    TWICE_UNAVAILABLE = auto()
    IGNORES_RANGE = auto()
    WRONG_RANGE = auto()
    UNNAMED_RANGE = auto()
    NO_SIZE = auto()
    TRUNCATES = auto()
    COMPRESSES = auto()
    NOT_JSON = auto()
    NO_COMMIT = auto()


@dataclass
class HubStandIn:
    """Serves ``root/org/name`` as ``org/name``.

    Attributes:
        root: folder of repositories.
        fault: what it does wrong, if anything.
        token: the only one that has access; None if everyone has.
        redirects: safetensors are served from another path.
        revisions: names of the one commit.
        requests: method, path and Range header of each.
        sent: bytes of bodies sent, by file name.
        leaked_tokens: Authorization headers that reached the other host.
    """

    root: Path
    fault: Fault | None = None
    token: str | None = None
    redirects: bool = True
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    leaked_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.failures = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def bytes_sent(self) -> int:
        return sum(self.sent.values())

    def forget(self) -> None:
        """Begin to count anew."""
        self.requests.clear()
        self.sent.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has read enough closes the connection."""


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        stand_in = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: HubStandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.stand_in, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
        try:
            if path.startswith("/cdn/"):
                hub.leaked_tokens += self.headers.get_all("Authorization", [])
                return self._file(hub.root / path.removeprefix("/cdn/"), is_final=True)
            if self._refused(path):
                return None
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                return self._api(*match.groups())
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._resolve(*match.groups())
            self._error(404, "no such page")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _refused(self, path: str) -> bool:
        hub = self.stand_in
        is_file = "/resolve/" in path
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._error(401, "Invalid credentials", "GatedRepo" if hub.fault is Fault.GATED else "")
        elif hub.fault is Fault.UNAUTHORIZED:
            self._error(401, "Invalid username or password.")
        elif hub.fault is Fault.GATED and is_file:
            self._error(403, "Access to model is restricted", "GatedRepo")
        elif hub.fault is Fault.RATE_LIMITED and is_file:
            self._error(429, "Too many requests", retry_after=300)
        elif hub.fault is Fault.UNAVAILABLE or (hub.fault is Fault.TWICE_UNAVAILABLE and hub.failures < 2):
            with hub.lock:
                hub.failures += 1
            self._error(503, "Service unavailable")
        elif hub.fault is Fault.NOT_JSON and "/api/" in path:
            self._send(200, b"<html>a proxy's page</html>", {"Content-Type": "text/html"})
        else:
            return False
        return True

    def _api(self, repository: str, kind: str | None, revision: str | None) -> None:
        folder = self.stand_in.root / repository
        if not folder.is_dir():
            return self._error(404, "Repository not found", "RepoNotFound")
        if revision is not None and revision not in self.stand_in.revisions:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        answer: Any
        if kind == "tree":
            answer = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
                for path in files
            ]
        else:
            commit = None if self.stand_in.fault is Fault.NO_COMMIT else COMMIT
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            answer = {
                "_id": "1",
                "id": repository,
                "modelId": repository,
                "sha": commit,
                "siblings": siblings,
                "tags": [],
            }
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        path = self.stand_in.root / repository / name
        if revision not in self.stand_in.revisions:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if not path.is_file():
            return self._error(404, "Entry not found", "EntryNotFound")
        if not (self.stand_in.redirects and name.endswith(".safetensors")):
            return self._file(path, is_final=False)
        # Another host name, as the Hub's: tokens are not for it, and its answers have none of the Hub's headers.
        location = f"{self.stand_in.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{repository}/{name}?signature=1"
        headers = {**_hub_headers(path), "Location": location, "X-Linked-Size": str(path.stat().st_size)}
        return self._send(302, b"", {**headers, "X-Linked-Etag": f'"{_etag(path)}"'})

    def _file(self, path: Path, *, is_final: bool) -> None:
        fault, size = self.stand_in.fault, path.stat().st_size
        is_shard = path.name.endswith(".safetensors")
        headers = {**({} if is_final else _hub_headers(path)), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end, status = 0, size, 200
        if asked and fault not in {Fault.IGNORES_RANGE, Fault.NO_SIZE}:
            begin = int(asked[1])
            if begin >= size:
                return self._error(416, "Range not satisfiable")
            end, status = min(int(asked[2] or size) + 1, size), 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            if fault is Fault.WRONG_RANGE:
                headers["Content-Range"] = f"bytes {begin + 8}-{end + 7}/{size + 8}"
            if fault is Fault.UNNAMED_RANGE:
                del headers["Content-Range"]
        if fault is Fault.NO_SIZE and is_shard:
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(end - begin)
        if fault is Fault.COMPRESSES:
            headers["Content-Encoding"] = "gzip"
        self._head(status, headers)
        if self.command == "GET":
            if fault is Fault.TRUNCATES and is_shard:
                end, self.close_connection = begin + (end - begin) // 2, True
            self._stream(path, begin, end)
        return None

    def _stream(self, path: Path, begin: int, end: int) -> None:
        hub = self.stand_in
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                chunk = file.read(min(CHUNK_BYTES, end - begin))
                self.wfile.write(chunk)
                begin += len(chunk)
                with hub.lock:
                    hub.sent[path.name] = hub.sent.get(path.name, 0) + len(chunk)

    def _error(self, status: int, message: str, code: str = "", retry_after: int = 0) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "text/plain"}
        if code:
            headers["X-Error-Code"] = code
        if retry_after:
            headers["Retry-After"] = str(retry_after)
        self._send(status, message.encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _hub_headers(path: Path) -> dict[str, str]:
    return {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}


def _etag(path: Path) -> str:
    return hashlib.sha1(f"{path} {path.stat().st_size}".encode()).hexdigest()


def turn_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when it is set before huggingface_hub is imported."""
    from huggingface_hub import constants, file_download

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # Versions before 1.0 have copies in the second.
        for name, value in (("ENDPOINT", endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
