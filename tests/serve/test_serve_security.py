"""What strangers must not get, take or hold: keys, files, addresses, memory, time."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import hmac
import http.server
import io
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

import serve_media as made

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}


def chat_with(url: str, kind: str = "image_url") -> dict[str, Any]:
    return {**BODY, "messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}


def message(reply: Any) -> str:
    return str(reply.json()["error"]["message"])


def raw(port: int, *pieces: bytes, seconds: float = 10.0, pause: float = 0.0) -> tuple[bytes, float]:
    """What comes back on a bare connection until the server closes it, and after how long."""
    began = time.monotonic()
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while piece := connection.recv(65_536):
                got += piece
        except ConnectionError:
            pass
    return got, time.monotonic() - began


def test_the_key(start_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    with start_server(api_key="sésame") as server, httpx.Client(base_url=server.url) as client:
        right = {"authorization": b"Bearer " + "sésame".encode()}
        wrong = [
            {},
            {"authorization": "Bearer"},
            {"authorization": "Bearer x"},
            {"authorization": b"Basic " + "sésame".encode()},
            {"authorization": b"Bearer sesame"},
        ]
        for headers in wrong:
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
                reply = client.request(method, path, headers=headers, json=BODY if method == "POST" else None)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
        assert compared, "compared in constant time"
        assert client.post(CHAT, headers=right, json=BODY).status_code == 200
        for path in ("/", "/page.js", "/page.css", "/health"):
            assert client.get(path).status_code == 200
        assert "sésame" not in repr(server.service.settings)


def test_headers_that_protect_a_browser(server: Any) -> None:
    with httpx.Client(base_url=server.url) as client:
        for path in ("/", "/page.js", "/page.css", "/health", "/v1/models", "/nowhere"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in headers
            assert "server" not in headers
        page = client.get("/").text
        assert "http://" not in page and "https://" not in page and "<script>" not in page and 'style="' not in page


def test_hosts_of_a_proxy(start_server: Callable[..., Any]) -> None:
    with start_server(allow_hosts=("Chat.Example",)) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/v1/models", headers={"host": "chat.example"}).status_code == 200
        assert client.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


@pytest.fixture
def pictures() -> Iterator[str]:
    """A web server on this machine, with a picture, a way elsewhere, and a picture that never ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("location", self.path[4:])
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            try:
                self.wfile.write(made.png())
                while self.path == "/endless":
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f":{web.server_address[1]}"
        web.shutdown()


def test_only_listed_hosts_are_asked(start_server: Callable[..., Any], pictures: str) -> None:
    limits = {"body_bytes": 1_000_000}
    with (
        start_server(media_hosts=("127.0.0.1", "localhost"), limits=limits) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):

        def told(url: str) -> str:
            reply = client.post(CHAT, json=chat_with(url))
            assert reply.status_code == 400, reply.text
            return message(reply)

        here = f"http://127.0.0.1{pictures}"
        assert client.post(CHAT, json=chat_with(f"{here}/a.png")).status_code == 200, "a listed number is a wish"
        assert "leads to a private address" in told(f"http://localhost{pictures}/a.png"), "a name must be public"
        assert "the host 'example.org' is not allowed" in told("http://example.org/a.png")
        assert "the host 'evil' is not allowed" in told("http://127.0.0.1@evil/a.png")
        assert "is not allowed" in told(f"http://[::1]{pictures}/a.png")
        assert "is not allowed" in told("http://2130706433/a.png")
        assert "the host 'evil.example' is not allowed" in told(f"{here}/to/http://evil.example/")
        assert "leads to a private address" in told(f"{here}/to/http://localhost{pictures}/a.png")
        assert "addresses are not read" in told(f"{here}/to/ftp://example.org/a.png")
        assert "reads no files" in told("file:///etc/passwd")
        assert "more than the limit of 1,000,000 bytes" in told(f"{here}/endless")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::"],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    from omnifp4.chat.download import is_public

    assert not is_public(address)
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_only_one_folder_is_read(start_server: Callable[..., Any], tmp_path: Path) -> None:
    allowed, secret = tmp_path / "media", tmp_path / "secret.png"
    allowed.mkdir()
    (allowed / "a.png").write_bytes(made.png())
    secret.write_bytes(made.png())
    (allowed / "link.png").symlink_to(secret)
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "b.png").write_bytes(made.png())
    with start_server(media_folder=allowed) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        for url in (f"file://{allowed}/a.png", f"{allowed}/a.png", f"{allowed}/../media/a.png"):
            assert client.post(CHAT, json=chat_with(url)).status_code == 200, url
        for url in (str(secret), f"file://{allowed}/../secret.png", f"{allowed}/%2e%2e/secret.png",
                    f"file://{allowed}/%2e%2e/secret.png", f"{allowed}/link.png", f"{tmp_path}/media-too/b.png",
                    "/etc/passwd", "/nowhere/at/all.png"):  # fmt: skip
            reply = client.post(CHAT, json=chat_with(url))
            assert reply.status_code == 400, url
            # A path is taken as it stands, so that one with %2e names a file that is not there.
            assert "outside the folder of allowed files" in message(reply) or url.startswith(f"{allowed}/%2e")


def test_nothing_touches_the_disk(server: Any, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    video = {"type": "video_url", "video_url": {"url": made.data_url(made.mp4(tmp_path), "video/mp4")}}
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    written: list[str] = []
    monkeypatch.setattr(Path, "write_bytes", lambda path, _: written.append(str(path)))
    messages = [{"role": "user", "content": [made.image_part(), made.audio_part(), video]}]
    client.chat.completions.create(
        model="tiny-omni",
        messages=messages,
        max_tokens=2,
        modalities=["text", "audio"],
        audio={"voice": "Ethan", "format": "flac"},
    )
    assert written == [] and list(temporary.iterdir()) == []


@pytest.fixture(scope="module")
def narrow(start_server: Callable[..., Any]) -> Iterator[Any]:
    """A server with little room and no patience."""
    limits = {
        "body_bytes": 100_000,
        "bodies_bytes": 150_000,
        "body_seconds": 0.5,
        "header_seconds": 0.4,
        "idle_seconds": 1,
        "header_bytes": 8_192,
        "write_seconds": 0.5,
        "request_seconds": 1.0,
        "waiting": 1,
        "new_tokens": 20_000,
        "decode_seconds": 0.0,
    }
    with start_server(limits=limits, most_sequences=1) as server:
        yield server


def head(length: int | str = 10, *more: str) -> bytes:
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {length}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_bodies_are_bounded(narrow: Any) -> None:
    with httpx.Client(base_url=narrow.url) as client:
        large = json.dumps({**BODY, "user": "x" * 100_000}).encode()
        assert client.post(CHAT, content=large, headers={"content-type": "application/json"}).status_code == 413
        chunks = (b"x" * 10_000 for _ in range(20))
        assert client.post(CHAT, content=chunks, headers={"content-type": "application/json"}).status_code == 413
    got, seconds = raw(narrow.port, head(10**12))
    assert b" 413 " in got and seconds < 8, "refused by its stated length alone, and closed"


def test_slow_bodies_and_headers_are_given_up(narrow: Any) -> None:
    got, seconds = raw(narrow.port, head(1_000), b"{", seconds=10)
    assert b" 408 " in got and seconds < 8
    for start in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "):
        got, seconds = raw(narrow.port, start, seconds=10)
        assert got == b"" and seconds < 8
    drip = [b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 20]
    got, seconds = raw(narrow.port, *drip, pause=0.1, seconds=10)
    assert got == b"" and seconds < 8, "a header now and then does not win time"
    again = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    got, seconds = raw(narrow.port, again, b"GET /hea", pause=0.2, seconds=10)
    assert got.startswith(b"HTTP/1.1 200") and seconds < 8, "nor does a second request on the same connection"


def test_header_floods_are_refused(narrow: Any) -> None:
    flood = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x-y: " + b"z" * 20_000 + b"\r\n\r\n"
    got, _ = raw(narrow.port, flood)
    assert b" 200 " not in got
    many = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 50_000 + b"\r\n"
    got, _ = raw(narrow.port, many)
    assert b" 200 " not in got
    for nonsense in (b"\x16\x03\x01" + bytes(200), b"\r\n" * 1_000, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        got, _ = raw(narrow.port, nonsense)
        assert b" 200 " not in got
    assert httpx.get(f"{narrow.url}/health").json() == {"status": "ok"}


def test_the_queue_and_the_time_are_bounded(narrow: Any) -> None:
    """One place and one that waits: of four, two are refused at once, and two run out of time."""
    endless = {**BODY, "max_tokens": 20_000, "ignore_eos": True}
    barrier = threading.Barrier(4)

    def ask(_: int) -> Any:
        barrier.wait()
        return httpx.post(narrow.url + CHAT, json=endless, timeout=30)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, range(4)))
    assert sorted(reply.status_code for reply in replies) == [503, 503, 504, 504]
    refused = next(reply for reply in replies if reply.status_code == 503)
    assert refused.headers["retry-after"] == "1" and "most that this server takes" in message(refused)
    late = next(reply for reply in replies if reply.status_code == 504)
    assert message(late) == "the answer took more than 1 s"
    assert httpx.post(narrow.url + CHAT, json=BODY, timeout=30).status_code == 200
    streamed = httpx.post(narrow.url + CHAT, json={**endless, "stream": True}, timeout=30)
    assert '"code":"timeout"' in streamed.text and "[DONE]" not in streamed.text


def test_silent_connections_are_bounded(start_server: Callable[..., Any]) -> None:
    from omnifp4.serve.protocol import SPARE_CONNECTIONS

    with start_server(limits={"connections": 4, "header_seconds": 30.0}) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4 + SPARE_CONNECTIONS)]
        got, _ = raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert got == b"", "closed without a word"
        for one in silent[4:]:
            one.close()
        deadline = time.monotonic() + 10
        while (
            b" 503 " not in raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")[0]
        ):
            assert time.monotonic() < deadline
        for one in silent[:4]:
            one.close()
        while (
            b" 200 " not in raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")[0]
        ):
            assert time.monotonic() < deadline


def test_frames_larger_than_the_header_says(server: Any) -> None:
    """One small frame, then frames of 49 million pixels: the decoder itself refuses them."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    from fractions import Fraction

    from PIL import Image

    file, large = io.BytesIO(), io.BytesIO()
    Image.new("L", (7_000, 7_000)).save(large, "JPEG", quality=1)
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for packet in stream.encode(av.VideoFrame(64, 48, "yuvj420p")):
            container.mux(packet)
        for number in range(1, 4):
            packet = av.Packet(large.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    reply = httpx.post(server.url + CHAT, json=chat_with(made.data_url(file.getvalue(), "video/webm"), "video_url"))
    assert reply.status_code == 400 and "is damaged or no video" in message(reply)


def test_long_decoding_is_given_up(narrow: Any, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    reply = httpx.post(
        narrow.url + CHAT, json=chat_with(made.data_url(made.mp4(tmp_path), "video/mp4"), "video_url"), timeout=30
    )
    assert reply.status_code == 400 and "takes more than 0 s to decode" in message(reply)
    sound = {"messages": [{"role": "user", "content": [made.audio_part()]}], "max_tokens": 1}
    reply = httpx.post(narrow.url + CHAT, json=sound, timeout=30)
    assert reply.status_code == 400 and "takes more than 0 s to decode" in message(reply)


def test_clients_that_do_not_read_are_given_up(start_server: Callable[..., Any]) -> None:
    limits = {"write_seconds": 0.3, "speech_seconds": 8.0, "request_seconds": 60.0}
    with start_server(limits=limits, send_buffer=4_096) as server:
        body = json.dumps({"input": "Hello.", "voice": "Ethan", "response_format": "pcm"}).encode()
        request = (
            f"POST /v1/audio/speech HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode() + body
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request)
            deadline = time.monotonic() + 30
            while server.service.scheduler.waiting == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while server.service.scheduler.waiting:
                assert time.monotonic() < deadline, "it waits for a client that reads nothing"
                time.sleep(0.02)


def test_the_end_is_told(start_server: Callable[..., Any]) -> None:
    """Streams under way have some time left, and then an error as their last event; so has an answer being spoken."""
    endless = {**BODY, "max_tokens": 8_000, "ignore_eos": True, "stream": True}
    spoken = {"input": "Hello.", "voice": "Ethan", "response_format": "wav"}
    with start_server(grace_seconds=0.3, limits={"speech_seconds": 60.0}) as server, ThreadPoolExecutor(2) as pool:
        stream = pool.submit(httpx.post, server.url + CHAT, json=endless, timeout=30)
        speech = pool.submit(httpx.post, f"{server.url}/v1/audio/speech", json=spoken, timeout=30)
        deadline = time.monotonic() + 20
        while not (server.service.scheduler.running and _speaking(server)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.server.should_exit = True
        lines = stream.result().text.split("\n\n")
        assert len(lines) > 3 and "the server is going down" in lines[-2]
        with suppress(httpx.RemoteProtocolError):  # it had begun, and is cut
            assert speech.result().status_code in (200, 503)


def _speaking(server: Any) -> bool:
    return bool(server.service.metrics.registry.get_sample_value("omnifp4_answers_speaking"))


def test_settings_are_checked(tmp_path: Path) -> None:
    from omnifp4.errors import OmniFP4Error
    from omnifp4.serve.running import listen
    from omnifp4.serve.settings import Settings

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"port": 70_000}, "port is 70000"),
        ({"api_key": " "}, "the API key is empty"),
        ({"media_folder": tmp_path / "none"}, "is not a folder"),
        ({"media_hosts": ("http://x",)}, "'http://x' is not a host name"),
    ]
    for arguments, says in wrong:
        with pytest.raises(OmniFP4Error, match=says):
            Settings(name="x", **arguments)
    taken = listen(Settings(name="x", port=0))
    taken.listen()
    with pytest.raises(OmniFP4Error, match=r"cannot listen on 127.0.0.1 port \d+: .*--port"):
        listen(Settings(name="x", port=taken.getsockname()[1]))
    taken.close()
    assert not Settings(name="x", host="0.0.0.0").is_loopback and Settings(name="x", host="0.0.0.0").known_hosts is None
