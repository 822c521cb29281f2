"""From what a person hands over to encoded bytes: paths, data URLs, web addresses, bytes; and what the bytes really are.

Nothing here decodes. What may be reached is a rule, and the content, not a name or a declared type, says what it is.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifp4.chat.download import download
from omnifp4.chat.errors import MediaError, need

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")

HEAD_BYTES = 64
_IMAGE, _AUDIO, _VIDEO = frozenset({"image"}), frozenset({"audio"}), frozenset({"video"})
_EITHER = _AUDIO | _VIDEO


@dataclass(frozen=True, slots=True)
class Reach:
    """Where media may come from.

    Attributes:
        files: local files: True, False, or the only folder they may lie in (links are followed first).
        urls: web addresses: False, True, or the only host names.
        max_bytes: the most that a data URL, bytes or a web address may hold; files are read piece by piece.
        seconds: patience with a web server.
        private: allowed host names may lead to private networks and to this machine.
    """

    files: bool | Path = True
    urls: bool | Collection[str] = False
    max_bytes: int = 256_000_000
    seconds: float = 30.0
    private: bool = True


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file's content, on disk or in memory."""

    content: Path | bytes
    name: str
    """For messages: a short name, never the data itself."""

    def open(self) -> Any:
        """What soundfile, PyAV and Pillow can read from: a path or a file object."""
        return str(self.content) if isinstance(self.content, Path) else io.BytesIO(self.content)

    def head(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[:HEAD_BYTES]
        with self.content.open("rb") as file:
            return file.read(HEAD_BYTES)


def scheme_of(source: str) -> str:
    """``data``, ``http`` and so on; empty for a path."""
    if source[:5].lower() == "data:":
        return "data"
    match = _SCHEME.match(source)
    return match[1].lower() if match else ""


def fetch(source: str | os.PathLike[str] | bytes, kind: str, reach: Reach, where: str) -> Encoded:
    """Finds the bytes of a source and checks that they can be `kind`.

    Args:
        source: path, ``file://`` or data URL, web address, or bytes.
        kind: ``image``, ``audio`` or ``video``.
        reach: what is allowed.
        where: which part of which message, for errors.

    Raises:
        MediaError: not allowed, not there, empty, too large, or of another kind than asked or declared.
    """
    declared = ""
    if isinstance(source, bytes | bytearray | memoryview):
        encoded = Encoded(bytes(source), "bytes")
    elif isinstance(source, str) and source[:5].lower() == "data:":
        declared, data = _data_url(source, where, reach.max_bytes)
        encoded = Encoded(data, f"data URL of type {declared or 'unknown'}")
    elif isinstance(source, str) and (match := _SCHEME.match(source)):
        scheme = match[1].lower()
        if scheme == "file":
            encoded = _file(Path(urllib.request.url2pathname(urllib.parse.urlsplit(source).path)), kind, reach, where)
        elif scheme in ("http", "https"):
            encoded = Encoded(_download(source, reach, where), source.partition("?")[0])
        else:
            hint = "allowed: local files, data URLs" + (", http and https" if reach.urls else "")
            raise MediaError(f"{where}: {scheme}:// addresses are not read", hint=hint)
    elif isinstance(source, str | os.PathLike):
        encoded = _file(Path(source), kind, reach, where)
    else:
        raise MediaError(f"{where}: cannot read {kind} from a value of type {type(source).__name__}")
    if isinstance(encoded.content, bytes) and len(encoded.content) > reach.max_bytes:
        raise MediaError(f"{where}: {encoded.name} holds more than the limit of {reach.max_bytes:,} bytes")
    return _checked(encoded, kind, declared, where)


CONTAINERS = "aac,ac3,aiff,amr,asf,avi,flac,flv,gif,matroska,mov,mp3,mpeg,mpegts,mpegvideo,ogg,wav"
"""What FFmpeg may read: no playlists and scripts, which name other files and addresses that it would then open."""


def open_container(encoded: Encoded) -> Any:
    """Opens audio or video with PyAV; raises its errors."""
    av = need("av", "reading audio and video")
    return av.open(encoded.open(), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def check_codec(stream: Any, name: str, where: str) -> None:
    """Refuses a stream that PyAV finds no decoder for: it then has no codec, and says so nowhere.

    Raises:
        MediaError: there is none.
    """
    if stream.codec_context is None:
        raise MediaError(
            f"{where}: {name} is damaged, or coded in a way that is not known here", hint="convert it first"
        )


def sniff(head: bytes) -> tuple[frozenset[str], str]:
    """What content can be, by its first bytes.

    Returns:
        The kinds it can be (empty: unknown), and the type's name.
    """
    for offset, magic, kinds, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kinds, name
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
            return _IMAGE, "image/heif"
        return (_AUDIO, "audio/mp4") if brand in (b"M4A ", b"M4B ") else (_EITHER, "video/mp4")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return _AUDIO, "audio/mpeg"
    start = head.lstrip()[:15].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"{", b"[")):
        return frozenset({"text"}), "text"
    if head and all(byte in _TEXT_BYTES for byte in head):
        return frozenset({"text"}), "text"
    return frozenset(), "unknown"


_TEXT_BYTES = frozenset({9, 10, 13, *range(32, 127)})

_MAGIC: tuple[tuple[int, bytes, frozenset[str], str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", _IMAGE, "image/png"),
    (0, b"\xff\xd8\xff", _IMAGE, "image/jpeg"),
    (0, b"GIF8", _IMAGE | _VIDEO, "image/gif"),
    (8, b"WEBP", _IMAGE, "image/webp"),
    (0, b"BM", _IMAGE, "image/bmp"),
    (0, b"II*\x00", _IMAGE, "image/tiff"),
    (0, b"MM\x00*", _IMAGE, "image/tiff"),
    (8, b"WAVE", _AUDIO, "audio/wav"),
    (8, b"AVI ", _VIDEO, "video/avi"),
    (0, b"fLaC", _AUDIO, "audio/flac"),
    (0, b"OggS", _EITHER, "audio/ogg"),
    (0, b"ID3", _AUDIO, "audio/mpeg"),
    (8, b"AIF", _AUDIO, "audio/aiff"),
    (0, b"#!AMR", _AUDIO, "audio/amr"),
    (0, b"\x1aE\xdf\xa3", _EITHER, "video/webm"),
    (0, b"\x00\x00\x01\xba", _VIDEO, "video/mpeg"),
    (0, b"%PDF", frozenset({"document"}), "application/pdf"),
    (0, b"PK\x03\x04", frozenset({"archive"}), "application/zip"),
    (0, b"\x1f\x8b", frozenset({"archive"}), "application/gzip"),
)


def _checked(encoded: Encoded, kind: str, declared: str, where: str) -> Encoded:
    try:
        head = encoded.head()
    except OSError as error:
        raise MediaError(f"{where}: cannot read {encoded.name}: {error.strerror or error}") from error
    if not head:
        raise MediaError(f"{where}: {encoded.name} is empty (0 bytes)", hint=f"it should hold {kind}")
    kinds, name = sniff(head)
    family = declared.partition("/")[0]
    if family in ("image", "audio", "video", "text") and kinds and family not in kinds:
        raise MediaError(f"{where}: wrong MIME type: declared {declared}, but the content is {name}")
    if kinds and kind not in kinds:
        kin = next((one for one in ("image", "audio", "video") if one in kinds), "")
        raise MediaError(
            f"{where}: {encoded.name} holds {name}, not {kind}", hint=f"pass it as {kin}" if kin else f"give {kind}"
        )
    return encoded


def _file(path: Path, kind: str, reach: Reach, where: str) -> Encoded:
    if reach.files is False:
        raise MediaError(f"{where}: local files are not allowed here", hint="send a data URL")
    try:
        real = path.expanduser().resolve()
        if isinstance(reach.files, Path) and not real.is_relative_to(reach.files.resolve()):
            # The same words whether the file exists or not.
            raise MediaError(f"{where}: {str(path)!r} is outside the folder of allowed files")
        regular = real.is_file()
        there = real.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{where}: {str(path)[:80]!r} is not a path: {reason}") from error
    if not regular:
        what = "is not a file" if there else "does not exist"
        raise MediaError(f"{where}: {str(path)[:200]!r} {what}", hint=f"{kind} comes from a file, data URL or array")
    return Encoded(real, path.name)


def _data_url(source: str, where: str, max_bytes: int) -> tuple[str, bytes]:
    header, comma, data = source[5:].partition(",")
    mime, *parameters = (item.strip().lower() for item in header.split(";"))
    if not comma or "base64" not in parameters:
        raise MediaError(f"{where}: the data URL is not base64", hint="data:image/png;base64,…")
    if len(data) * 3 // 4 > max_bytes:
        raise MediaError(f"{where}: the data URL holds more than the limit of {max_bytes:,} bytes")
    try:
        return mime, base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{where}: the data URL's base64 is damaged: {error}") from error


def _allow_url(url: str, reach: Reach, where: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if reach.urls is False:
        raise MediaError(
            f"{where}: the URL {url[:80]!r} is not allowed: only local files and data URLs are",
            hint="allow_urls=True or --allow-urls",
        )
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"{where}: {parts.scheme}:// addresses are not read")
    if reach.urls is not True and (parts.hostname or "") not in reach.urls:
        raise MediaError(f"{where}: the host {parts.hostname!r} is not allowed", hint=", ".join(sorted(reach.urls)))


def _download(url: str, reach: Reach, where: str) -> bytes:
    def allow(address: str) -> None:
        _allow_url(address, reach, where)

    try:
        return download(url, allow, max_bytes=reach.max_bytes, seconds=reach.seconds, private=reach.private)
    except (OSError, ValueError) as error:
        raise MediaError(f"{where}: cannot read {url[:80]!r}: {error}") from error
