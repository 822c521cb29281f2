"""Who may ask: the key, the host names a server goes by, and what is said to browsers."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from serve_requests import BODY, CHAT, raw


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


def test_settings_are_checked(tmp_path: Path) -> None:
    from omnifp4.errors import OmniFP4Error
    from omnifp4.serve.running import listen
    from omnifp4.serve.settings import Settings

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"port": 70_000}, "port is 70000"),
        ({"api_key": " "}, "the API key is empty"),
        ({"api_key": "sesame\n"}, "begins or ends with white space"),
        ({"allow_hosts": ("chat.example:443",)}, "--allow-host is 'chat.example:443', which is no host name"),
        ({"allow_hosts": ("https://chat.example",)}, "which is no host name"),
        ({"allow_hosts": (" chat.example",)}, "which is no host name"),
        ({"media_folder": tmp_path / "none"}, "is not a folder"),
        ({"media_hosts": ("http://x",)}, "--allow-media-host is 'http://x', which is no host name"),
    ]
    for arguments, says in wrong:
        with pytest.raises(OmniFP4Error, match=says):
            Settings(name="x", **arguments)
    taken = listen(Settings(name="x", port=0))
    taken.listen()
    with pytest.raises(OmniFP4Error, match=r"cannot listen on 127.0.0.1 port \d+: .*--port"):
        listen(Settings(name="x", port=taken.getsockname()[1]))
    taken.close()
    assert "localhost" in (Settings(name="x", host="LOCALHOST").known_hosts or ()), "however it is spelt"
    assert {"2001:db8::1", "fd00::5"} <= (
        Settings(name="x", allow_hosts=("2001:db8::1", "[fd00::5]")).known_hosts or frozenset()
    )
    assert not Settings(name="x", host="0.0.0.0").is_loopback and Settings(name="x", host="0.0.0.0").known_hosts is None


@pytest.mark.parametrize("path", ["/", "/page.js", "/health", "/metrics", "/v1/models", "/v1/audio/voices"])
def test_what_can_be_read_can_be_looked_for(server: Any, path: str) -> None:
    """Monitors and proxies ask with HEAD; no other site's page may ask with anything."""
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    with httpx.Client(base_url=server.url) as client:
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == client.get(path).headers["content-type"]
        reply = client.options(path, headers=asked)
        assert reply.status_code == 405 and not any("access-control" in name for name in reply.headers)


def test_a_body_has_one_length(server: Any) -> None:
    """What proxy and server could cut differently is refused, and the connection closed."""
    request = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"
        "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    ).encode()
    got, _ = raw(server.port, request)
    assert got.startswith(b"HTTP/1.1 400") and b"ambiguous_length" in got and got.count(b"HTTP/1.1 ") == 1
