"""Media from web addresses, within bounds of place, size and time.

What a name resolves to is judged at the moment of connecting, and the connection goes to the very address that was
judged: a name cannot mean one machine when it is checked and another when it is asked.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from typing import Any, Final

BLOCK: Final = 1 << 16

_TRANSLATED: Final = tuple(
    ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)
"""IPv6 addresses that stand for an IPv4 address inside them."""


class PrivateAddressError(OSError):
    """A name that resolves to an address which is not on the public internet."""


def download(url: str, allow: Callable[[str], None], *, max_bytes: int, seconds: float, private: bool) -> bytes:
    """Reads a web address.

    Args:
        url: http or https.
        allow: called with each address a redirect leads to; raises where it may not.
        max_bytes: one more than this is the most that is read.
        seconds: for all of it.
        private: machines on private networks, and this one, may be reached.

    Raises:
        OSError: it cannot be read, or not in time.
        PrivateAddressError: it leads to a private address.
    """
    allow(url)

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            allow(newurl)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    handlers: list[Any] = [Redirects]
    if not private:
        # A proxy would resolve names itself, out of our sight.
        handlers += [urllib.request.ProxyHandler({}), _PublicHTTP, _PublicHTTPS]
    deadline = time.monotonic() + seconds
    request = urllib.request.Request(url, headers={"User-Agent": "omnifp4"})
    data = bytearray()
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=seconds) as response:
            while len(data) <= max_bytes and (block := response.read1(BLOCK)):
                data += block
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {seconds:g} s")
    except http.client.HTTPException as error:
        raise OSError(f"the server's answer is not HTTP: {type(error).__name__}") from error
    return bytes(data[: max_bytes + 1])


def is_public(address: str) -> bool:
    """Whether an IP address, as text, belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in net for net in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast


def _connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """Connects to the first public address of a host; an address written as a number is its owner's explicit wish."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not all(is_public(str(address[0])) for *_, address in found):
            raise PrivateAddressError("it leads to a private address") from None
    return socket.create_connection((str(found[0][4][0]), port), timeout)


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.timeout)


class _PublicTLSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        raw = _connect(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=self.host)


class _PublicHTTP(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_PublicConnection, req)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_PublicTLSConnection, req)
