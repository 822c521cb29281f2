"""Scripts that stand still, or do not end."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.facts import Kind
from omnifp4.doctor.rules.base import problem
from omnifp4.receipt.diagnosis import Explanation, Outcome


def stalled(evidence: Evidence) -> Iterator[Explanation]:
    """Nothing moved: no output, no bytes, no memory, no call."""
    if evidence.outcome is not Outcome.STALLED:
        return
    loads = [load for load in evidence.loads if load.seconds is None]
    doing = "it used the processor meanwhile" if evidence.busy else "it waited, and used no processor"
    lines = [f"nothing moved for {evidence.stalled_for:.0f} s; {doing}"]
    lines += [f"in {load.loader}.from_pretrained({load.path!r})" for load in loads[-1:]]
    lines += evidence.stack[:6]
    if loads:
        yield problem(
            "stall.load",
            "the load of the model stands still",
            "; or ".join(_load_causes(evidence)),
            lines,
            'dtype="auto", a local disk, and a model that fits (omnifp4 doctor PATH)\n'
            "omnifp4.load(path) tells bytes done, rate and what it waits for",
        )
        return
    yield problem(
        "stall", "the script stands still", _cause(evidence), lines, "the innermost frame above is where it waits"
    )


def _load_causes(evidence: Evidence) -> list[str]:
    causes = []
    for load, facts in evidence.loaded():
        dtype = load.arguments.get("dtype", load.arguments.get("torch_dtype", "")).strip("'").removeprefix("torch.")
        if load.seconds is None and facts.kind is not Kind.WIDE and dtype not in ("", "auto", "bfloat16"):
            causes.append(f"dtype {dtype} of a quantized checkpoint: every tensor is converted")
    if evidence.busy:
        causes.append("weights are converted or initialized one by one on the CPU")
    else:
        causes.append("the disk or network file system does not answer")
        causes.append("another process holds a lock on the cache")
    causes.append("memory is short, and the machine swaps")
    return causes


def _cause(evidence: Evidence) -> str:
    stack = " ".join(evidence.stack[:8])
    if re.search(r"in (input|readline|read)\b", stack) and "stdin" in stack:
        return "it waits for input"
    if re.search(r"socket|ssl|http|urllib|requests", stack):
        return "it waits for the network"
    if re.search(r"in (acquire|wait|join|get)\b|threading|multiprocessing|subprocess", stack):
        return "it waits for another thread or process"
    return "it waits; the stack tells for what"


def timed_out(evidence: Evidence) -> Iterator[Explanation]:
    """It was still at work."""
    if evidence.outcome is Outcome.TIMED_OUT:
        yield problem(
            "run.timeout",
            f"the script was still running after {evidence.seconds:.0f} s and was ended",
            "it was at work, but did not end in the time that it was given",
            evidence.stack[:6],
            "give it more time: --timeout",
        )


def crashed(evidence: Evidence) -> Iterator[Explanation]:
    """A crash in native code."""
    if evidence.outcome is Outcome.KILLED and evidence.status in (-11, -6, -4, -7):
        yield problem(
            "run.crash",
            f"the process crashed in native code (signal {-evidence.status})",
            "a compiled extension that does not fit this torch, driver or processor",
            evidence.stack[:6],
            "omnifp4 doctor shows which versions do not belong together",
        )


RULES = (stalled, timed_out, crashed)
