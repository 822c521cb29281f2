"""The structural checks of `omnifp4.verify`, as far as headers, config and the tensor scales
tell: quick, whatever the size."""

from __future__ import annotations

from omnifp4.doctor.facts import Facts, Kind
from omnifp4.doctor.scales import check_scales
from omnifp4.errors import OmniFP4Error
from omnifp4.models import layout_for
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.verification import Check

SHOWN = 8
BROKEN = "files.readable"


def broken_check(error: Exception) -> Check:
    """The check of a checkpoint that could not be read at all."""
    return Check(
        name=BROKEN,
        title="the files are a checkpoint",
        verdict=Verdict.FAIL,
        summary=str(error),
        findings=(str(error),),
        finding_count=1,
        fix="download or copy the checkpoint again",
    )


def check_structure(facts: Facts) -> tuple[Check, ...]:
    """Judge names, shapes, config and ignore list; values are for ``omnifp4 verify``."""
    try:
        if facts.kind is Kind.NVFP4:
            return _check_artifact(facts)
        if facts.kind is Kind.OTHER:
            return (_unchecked(f"its names are those of {facts.dialect or 'another method'}"),)
        return (_check_names(facts),)
    except OmniFP4Error as error:
        return (_unchecked(str(error)),)


def _unchecked(why: str) -> Check:
    return Check(name="structure", title="the tensors are those of the model", verdict=Verdict.NOT_CHECKED, summary=why)


def _check_artifact(facts: Facts) -> tuple[Check, ...]:
    from omnifp4.verification import claims, completeness, coverage, ignoring, taking
    from omnifp4.verification.subject import Subject, read_subject

    if facts.folder is not None:
        subject = read_subject(facts.folder)
    else:
        layout = layout_for(facts.config, facts.checkpoint.tensors)
        subject = Subject(facts.checkpoint, layout, facts.claims, facts.linears, None)
    taken = taking.read_taking(subject)
    found = (
        claims.check_place(subject),
        claims.check_scheme(subject),
        completeness.check_tensors(subject)[0],
        coverage.check_present(subject, taken),
        coverage.check_coverage(subject),
        taking.check_ignore(subject, taken),
        ignoring.check_engines(subject, taken),
    )
    checks = [item.check() for item in found]
    if facts.folder is not None:
        checks.append(check_scales(facts))
    return tuple(checks)


def _check_names(facts: Facts) -> Check:
    layout = layout_for(facts.config, facts.checkpoint.tensors)
    missing = layout.missing(facts.checkpoint.tensors)
    statistics = set(facts.statistics)
    unknown = [name for name in layout.unknown(facts.checkpoint.tensors) if name not in statistics]
    findings = [f"{name}: missing" for name in missing[:SHOWN]] + [f"{name}: unknown" for name in unknown[:SHOWN]]
    count = len(missing) + len(unknown)
    return Check(
        name="tensors.names",
        title="the tensors are those of the model",
        verdict=Verdict.FAIL if missing else Verdict.PASS,
        summary=(
            f"{len(missing):,} tensors are missing, {len(unknown):,} are unknown"
            if count
            else f"all {len(facts.checkpoint.tensors):,} tensors are there"
        ),
        findings=tuple(findings),
        finding_count=count,
        fix="download or copy the checkpoint again" if missing else "",
    )


def failed(checks: tuple[Check, ...]) -> tuple[Check, ...]:
    """The checks that failed."""
    return tuple(check for check in checks if check.verdict is Verdict.FAIL)
