"""What all receipts share. A receipt is the versioned record of one run; renderers only show it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from typing import Final

from pydantic import BaseModel, ConfigDict

RECEIPT_VERSION: Final = 1
"""Raised when a field changes its meaning or goes away."""


class Record(BaseModel):
    """A frozen, strict piece of a receipt: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Verdict(StrEnum):
    """What a check says. There is no fourth value."""

    PASS = "pass"
    FAIL = "fail"
    NOT_CHECKED = "not checked"


class Environment(Record):
    """Where and with what a run was made."""

    omnifp4: str
    python: str
    numpy: str
    machine: str
    system: str
    made_at: str


def as_text(name: str) -> str:
    """A file name as text that JSON can hold: bytes that are no UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def package_version() -> str:
    """The installed version of this package."""
    try:
        return metadata.version("omnifp4")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def this_environment() -> Environment:
    """The environment of the running process."""
    return Environment(
        omnifp4=package_version(),
        python=platform.python_version(),
        numpy=metadata.version("numpy"),
        machine=platform.machine(),
        system=platform.system(),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
