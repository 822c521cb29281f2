"""What a check gathers while it runs, and how that becomes its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from omnifp4.receipt.base import Verdict
from omnifp4.receipt.verification import Check

MOST_SHOWN: Final = 24
"""Findings that a check lists; the rest is only counted."""


@dataclass
class Findings:
    """One check in the making.

    Attributes:
        name: stable identifier.
        title: what it checks.
        fix: what mends a failure.
        passed: the summary if nothing is wrong.
        failed: the summary otherwise; empty: the number of findings.
        unchecked: why it could not be done; empty if it was.
        notes: said after the summary, whatever the verdict.
    """

    name: str
    title: str
    fix: str = ""
    passed: str = ""
    failed: str = ""
    unchecked: str = ""
    notes: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, finding: str, count: int = 1) -> None:
        """Something wrong, worth `count` findings."""
        self.count += count
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(" ".join(finding.split()))

    def check(self) -> Check:
        """The verdict: fail if anything was found, else not checked if it could not be done, else pass."""
        if self.count:
            verdict, summary = Verdict.FAIL, self.failed or _counted(self.count, "finding")
        elif self.unchecked:
            verdict, summary = Verdict.NOT_CHECKED, self.unchecked
        else:
            verdict, summary = Verdict.PASS, self.passed
        return Check(
            name=self.name,
            title=self.title,
            verdict=verdict,
            summary="; ".join(text for text in (summary, *self.notes) if text),
            findings=tuple(self.shown),
            finding_count=self.count,
            fix=self.fix if self.count else "",
        )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
