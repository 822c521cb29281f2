"""Where media may come from: listed hosts, one folder, and never the disk for what is sent."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import http.server
import io
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

import serve_media as made
from serve_requests import CHAT, chat_with, message


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
