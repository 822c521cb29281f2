"""Receipts from files, read strictly: a wrong version, an unknown field or a value of another type is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Record, as_text

R = TypeVar("R", bound=Record)

LARGEST_BYTES: Final = 256_000_000
"""The receipt of a 35 B model has about 6 MB; what is far larger is another file."""
LARGEST_NUMBER: Final = 2**63
HOLDERS: Final = ("report", "comparison")
"""Kinds that hold whole receipts."""


class ReceiptError(OmniFP4Error):
    """A file is no receipt, or one that this version does not read."""


def read_receipt(path: Path, kinds: Mapping[str, type[R]]) -> tuple[R, str]:
    """A receipt and the SHA-256 of its file.

    Args:
        path: of a JSON file that a verb's ``--json`` printed, or an artifact's omnifp4.json.
        kinds: what may be read, by the name in the field ``receipt``.

    Raises:
        ReceiptError: it cannot be read, is no receipt of these kinds, is of another version, or a field is wrong.
    """
    name = as_text(str(path))
    content = _content(path, name)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReceiptError(
            f"{name}: is no JSON: {error}", hint="a receipt is what plan, quantize, verify … print with --json"
        ) from error
    kind = value.get("receipt") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        what = f"receipt is {kind!r:.60}" if kind is not None else "has no field receipt"
        raise ReceiptError(
            f"{name}: {what}; read are {', '.join(kinds)}", hint="omnifp4 VERB … --json > FILE makes one"
        )
    for field, version, held in _versions(value):
        known = kinds[held].model_fields["version"].default if held in kinds else "none"
        if version != known:
            raise ReceiptError(
                f"{name}: field {field}: is {version!r:.60}; this omnifp4 reads version {known} of the {held} receipt",
                hint="make the receipt again with this version of omnifp4, or read it with the one that made it",
            )
    for field, number in _numbers(value):
        if not -LARGEST_NUMBER <= number < LARGEST_NUMBER:
            raise ReceiptError(f"{name}: field {field}: is no number that fits 64 bits")
    try:
        return kinds[kind].model_validate_json(content, strict=True), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        given = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
        more = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise ReceiptError(
            f"{name}: field {field:.120}: {first['msg']}{given}{more}",
            hint=f"it is not as omnifp4 wrote a {kind} receipt",
        ) from error


def _content(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ReceiptError(f"{name}: has {path.stat().st_size:,} bytes; a receipt has at most {LARGEST_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ReceiptError(f"{name}: cannot be read: {reason}") from error


def _versions(document: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Field, version and kind of a receipt and of those that it holds: a gathered one all, a comparison its evaluations."""
    waiting: list[tuple[str, dict[str, Any]]] = [("", document)]
    while waiting:
        before, holder = waiting.pop(0)
        yield f"{before}version", holder.get("version", "missing"), str(holder["receipt"])
        if holder["receipt"] not in HOLDERS:
            continue
        for field, held in holder.items():
            members = [(field, held)] if isinstance(held, dict) else []
            members += [(f"{field}.{n}", item) for n, item in enumerate(held)] if isinstance(held, list) else []
            for place, item in members:
                if isinstance(item, dict) and "version" in item and isinstance(item.get("receipt"), str):
                    waiting.append((f"{before}{place}.", item))


def _numbers(document: Any) -> Iterator[tuple[str, int]]:
    """Every whole number in a document with its place."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{field}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{field}.{number}", item) for number, item in enumerate(value)]
        elif isinstance(value, int):
            yield field, value
