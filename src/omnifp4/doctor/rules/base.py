"""What rules share."""

from __future__ import annotations

from collections.abc import Iterable

from omnifp4.doctor.evidence import Evidence, Thrown
from omnifp4.receipt.diagnosis import Explanation
from omnifp4.receipt.doctor import Severity

OMNI_MODELS = ("Qwen3OmniMoe", "Qwen2_5Omni", "Qwen2_5OmniModel")


def problem(rule: str, title: str, cause: str, evidence: Iterable[str], fix: str) -> Explanation:
    """Something that went wrong."""
    return Explanation(
        rule=rule,
        severity=Severity.PROBLEM,
        title=title,
        cause=cause,
        evidence=tuple(e for e in evidence if e),
        fix=fix,
    )


def note(rule: str, title: str, cause: str, evidence: Iterable[str], fix: str) -> Explanation:
    """Something worth knowing."""
    return problem(rule, title, cause, evidence, fix).model_copy(update={"severity": Severity.NOTE})


def told(thrown: Thrown, most: int = 300) -> list[str]:
    """An exception as evidence: text, count, place."""
    text = thrown.text if len(thrown.text) <= most else thrown.text[:most] + " …"
    times = f" ({thrown.count:,} times)" if thrown.count > 1 else ""
    lines = [text + times, f"at {thrown.place}" if thrown.place else ""]
    if thrown.caller and thrown.caller != thrown.place:
        lines.append(f"called at {thrown.caller}")
    return lines


def omni_is_loaded(evidence: Evidence) -> bool:
    """Whether the script loaded an omni model."""
    return any(load.result.startswith(OMNI_MODELS) for load in evidence.loads) or any(
        record.model.startswith(OMNI_MODELS) for record in evidence.generates
    )
