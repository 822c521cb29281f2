"""Versions of packages, compared by their leading numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

Numbers = tuple[int, ...]


def numbers(version: str) -> Numbers:
    """``2.13.0+cpu`` is ``(2, 13, 0)``; what has no number in front is ``()``."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def minor(version: str) -> Numbers:
    """The first two numbers."""
    return (*numbers(version), 0, 0)[:2]


@dataclass(frozen=True, slots=True)
class Span:
    """Versions from `first` to `last`, both by their first two numbers and both included; empty: no bound."""

    first: str = ""
    last: str = ""

    def holds(self, version: str) -> bool:
        """Whether `version` is inside."""
        here = minor(version)
        return (not self.first or here >= minor(self.first)) and (not self.last or here <= minor(self.last))

    def __str__(self) -> str:
        if self.first and self.last:
            return self.first if self.first == self.last else f"{self.first} to {self.last}"
        return f"{self.first} or later" if self.first else f"up to {self.last}"
