"""The table of rules: each looks at the evidence and explains one kind of failure, or says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.rules import calls, engines, environment, loading, memory, prompt, results, stalls
from omnifp4.receipt.diagnosis import Explanation, Outcome
from omnifp4.receipt.doctor import Severity

Rule = Callable[[Evidence], Iterable[Explanation]]

RULES: tuple[Rule, ...] = (
    *prompt.RULES,
    *calls.RULES,
    *results.RULES,
    *loading.RULES,
    *engines.RULES,
    *memory.RULES,
    *environment.RULES,
    *stalls.RULES,
)


def explain(evidence: Evidence) -> tuple[Explanation, ...]:
    """Everything that the rules have to say, problems first; a failure that none explains is told as it is."""
    found: dict[str, Explanation] = {}
    for rule in RULES:
        for explanation in rule(evidence):
            found.setdefault(explanation.rule, explanation)
    problems = [item for item in found.values() if item.severity is Severity.PROBLEM]
    notes = [item for item in found.values() if item.severity is not Severity.PROBLEM]
    if not problems and evidence.outcome is not Outcome.ENDED:
        problems.append(_unexplained(evidence))
    return (*problems, *notes)


def _unexplained(evidence: Evidence) -> Explanation:
    last = next((t for t in reversed(evidence.thrown) if t.phase == "script"), None)
    if last is not None:
        return Explanation(
            rule="error.unexplained",
            severity=Severity.PROBLEM,
            title=last.text[:400],
            cause="this is none of the failures that are known here",
            evidence=tuple(reversed(last.frames[-6:])),
            fix="the innermost frames above say where it happened",
        )
    return Explanation(
        rule="exit.status",
        severity=Severity.PROBLEM,
        title=f"the script ended with status {evidence.status}",
        cause="it ended itself, without an exception that was seen",
        evidence=tuple(line for line in evidence.lines[-3:] if line.strip()),
        fix="its last lines of output may say why",
    )
