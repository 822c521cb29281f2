"""A user's own script, run under watch and explained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from omnifp4.doctor.child import Child, Run
from omnifp4.doctor.evidence import Evidence, collect, is_loading
from omnifp4.doctor.fit import fit_model
from omnifp4.doctor.machine import look_at_machine
from omnifp4.doctor.packages import installed
from omnifp4.doctor.rules import explain
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import this_environment
from omnifp4.receipt.diagnosis import DiagnosisReceipt, Explanation, Outcome
from omnifp4.receipt.doctor import Fit, Severity

STALL_SECONDS: Final = 120.0
TAIL: Final = 20
INTERRUPTED: Final = 130


def diagnose(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    timeout: float | None = None,
    stall_seconds: float = STALL_SECONDS,
    on_output: Callable[[str], None] | None = None,
) -> DiagnosisReceipt:
    """Run `script` with this Python, watch it, and explain what goes wrong.

    It runs as ``python SCRIPT ARGS`` would, in a process of its own; omnifp4 is not imported there unless it does so.

    Args:
        script: a Python file.
        args: its arguments.
        timeout: seconds after which it is ended in any case; None: never.
        stall_seconds: seconds without output, bytes read, memory or calls after which it is ended, if it is loading a
            model or uses no processor.
        on_output: called with each line that it prints, errors included, from another thread.

    Raises:
        OmniFP4Error: there is no such file, or a time is not positive.
    """
    path = Path(script).expanduser()
    if not path.is_file():
        raise OmniFP4Error(f"{script}: no such script", hint="give the path of a Python file")
    for name, value in (("timeout", timeout), ("stall seconds", stall_seconds)):
        if value is not None and not value > 0:
            raise OmniFP4Error(f"{name} is {value}; it must be positive")
    with tempfile.TemporaryDirectory(prefix="omnifp4-diagnose-") as home:
        child = Child(path.absolute(), args, Path(home), on_output)
        run = child.wait(timeout, stall_seconds, lambda: is_loading(child.log))
        evidence = collect(child.log, run.lines, child.stacks)
    _add_ending(evidence, run)
    explanations = explain(evidence)
    return _receipt(path, args, evidence, explanations)


def run_diagnose(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    timeout: float | None = None,
    stall_seconds: float = STALL_SECONDS,
    on_output: Callable[[str], None] | None = None,
) -> DiagnosisReceipt:
    """What the command line calls; see `diagnose`. Exit with status 1 unless ``healthy``."""
    return diagnose(script, args, timeout=timeout, stall_seconds=stall_seconds, on_output=on_output)


def _add_ending(evidence: Evidence, run: Run) -> None:
    evidence.seconds, evidence.status = run.seconds, run.status
    evidence.stalled_for, evidence.busy = run.stalled_for, run.busy
    if run.stalled_for:
        evidence.outcome = Outcome.STALLED
    elif run.timed_out:
        evidence.outcome = Outcome.TIMED_OUT
    elif run.status is not None and run.status < 0:
        evidence.outcome = Outcome.KILLED
    else:
        evidence.outcome = Outcome.ENDED if run.status == 0 else Outcome.FAILED


def _receipt(
    path: Path, args: Sequence[str], evidence: Evidence, explanations: tuple[Explanation, ...]
) -> DiagnosisReceipt:
    last = next((thrown for thrown in reversed(evidence.thrown) if thrown.phase == "script"), None)
    problems = any(item.severity is Severity.PROBLEM for item in explanations)
    return DiagnosisReceipt(
        script=str(path),
        arguments=tuple(args),
        outcome=evidence.outcome,
        exit_status=evidence.status,
        healthy=evidence.outcome is Outcome.ENDED and not problems,
        error=last.text if last is not None else "",
        seconds=evidence.seconds,
        explanations=explanations,
        cat=evidence.cat,
        calls=tuple(evidence.calls),
        loads=tuple(evidence.loads),
        generates=tuple(evidence.generates),
        structure=evidence.structure,
        fit=_fit(evidence, explanations),
        stack=evidence.stack or tuple(reversed(last.frames[-8:] if last is not None else ())),
        output_tail=tuple(evidence.lines[-TAIL:]),
        environment=this_environment(),
    )


def _fit(evidence: Evidence, explanations: tuple[Explanation, ...]) -> Fit | None:
    """What would fit, where memory was the matter."""
    if not any(item.rule.startswith(("memory.", "stall.load")) for item in explanations):
        return None
    paths = [load.path for load, _ in evidence.loaded()] + [engine["path"] for engine in evidence.vllm]
    facts = next((found for path in reversed(paths) if (found := evidence.facts(path)) is not None), None)
    return fit_model(facts, look_at_machine(installed("torch"))) if facts is not None else None
