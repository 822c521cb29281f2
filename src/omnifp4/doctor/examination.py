"""The examination: what is here, what the checkpoint is, and what can run it."""

from __future__ import annotations

import time
from pathlib import Path

from omnifp4.doctor import engine_rules as rules
from omnifp4.doctor.engines import judge_engines
from omnifp4.doctor.facts import Facts, read_facts
from omnifp4.doctor.fit import fit_model
from omnifp4.doctor.machine import look_at_machine
from omnifp4.doctor.misuse import find_misuse
from omnifp4.doctor.packages import Installed, list_tools
from omnifp4.doctor.question import Question
from omnifp4.doctor.soundness import broken_check, check_structure, failed
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.receipt.base import this_environment
from omnifp4.receipt.doctor import (
    Ability,
    CheckpointSummary,
    Concern,
    DoctorReceipt,
    EngineRow,
    Fit,
    Machine,
    Severity,
    Tool,
)


def examine(
    model: str | None = None, *, device_memory: int | None = None, revision: str | None = None
) -> DoctorReceipt:
    """Look at this machine and, if given, at a checkpoint; nothing heavy is imported, nothing is downloaded but headers.

    Args:
        model: a checkpoint folder or a Hub id.
        device_memory: bytes of a GPU to ask about in place of the machine's own.
        revision: of a Hub id.

    Raises:
        CheckpointError: `model` does not exist.
        OmniFP4Error: `device_memory` is not positive.
    """
    begin = time.perf_counter()
    if device_memory is not None and device_memory <= 0:
        raise OmniFP4Error(f"device memory {device_memory} is not a size", hint="such as 24GB")
    facts, error = _read(model, revision) if model is not None else (None, None)
    tools = list_tools()
    installed = Installed(tools)
    machine = look_at_machine(installed["torch"])
    concerns = _environment_concerns(installed, machine)
    summary, fit = None, None
    misuse: tuple[Concern, ...] = ()
    engines: tuple[EngineRow, ...] = ()
    if facts is not None and model is not None:
        checks = check_structure(facts)
        fit = fit_model(facts, machine, device_memory)
        misuse = find_misuse(facts)
        engines = judge_engines(Question(model, facts, checks, machine, installed, fit, device_memory, misuse))
        summary = CheckpointSummary(
            model=model,
            model_type=facts.model_type,
            kind=facts.kind.value,
            dialect=facts.dialect,
            activations=facts.activations,
            weight_bytes=facts.checkpoint.weight_bytes,
            parts=facts.parts,
            fp4_share=facts.fp4_share,
            sound=not failed(checks),
            checks=checks,
        )
    elif error is not None and model is not None:
        summary = CheckpointSummary(
            model=model,
            model_type="",
            kind="broken",
            dialect="",
            activations="",
            weight_bytes=0,
            parts={},
            fp4_share=0.0,
            sound=False,
            checks=(broken_check(error),),
        )
    return _receipt(model, machine, tools, concerns, summary, misuse, engines, fit, begin)


def run_doctor(
    model: str | None = None, *, device_memory: int | None = None, revision: str | None = None
) -> DoctorReceipt:
    """What the command line calls; see `examine`. Exit with status 1 if ``can_run`` is False."""
    return examine(model, device_memory=device_memory, revision=revision)


def _read(model: str, revision: str | None) -> tuple[Facts | None, CheckpointError | None]:
    """The facts, or what is wrong with a folder that exists."""
    try:
        return read_facts(model, revision), None
    except CheckpointError as error:
        folder = Path(model).expanduser()
        if folder.is_dir() and (folder / "config.json").is_file():
            return None, error
        raise


def _environment_concerns(installed: Installed, machine: Machine) -> tuple[Concern, ...]:
    found = []
    versions = {name: installed[name] for name in ("torch", "transformers", "vllm")}
    packages = dict.fromkeys(row.package for row in rules.VERSION_PAIRS)
    for package in packages:
        if installed[package]:
            found += [("versions", reason) for reason in rules.broken_pairs(package, installed[package], versions)]
    if machine.torch_problem:
        found.append(("torch", machine.torch_problem))
    return tuple(
        Concern(
            name=name,
            severity=Severity.PROBLEM,
            finding=reason,
            fix="one environment does not fit all engines: give each its own" if name == "versions" else "",
        )
        for name, reason in found
    )


def _receipt(
    model: str | None,
    machine: Machine,
    tools: tuple[Tool, ...],
    environment_concerns: tuple[Concern, ...],
    summary: CheckpointSummary | None,
    misuse: tuple[Concern, ...],
    engines: tuple[EngineRow, ...],
    fit: Fit | None,
    begin: float,
) -> DoctorReceipt:
    able = [row.engine for row in engines if row.ability is Ability.CAN]
    unknown = [row.engine for row in engines if row.ability is Ability.NOT_KNOWN]
    if model is None:
        can_run, verdict = True, "no MODEL was given: this is the environment alone"
    elif able:
        can_run, verdict = True, f"it can be run here with {', '.join(able)}"
    elif unknown:
        can_run, verdict = True, f"nothing is known to run it here; not known: {', '.join(unknown)}"
    else:
        reason = engines[0].reasons[0] if engines else summary.checks[0].summary if summary is not None else ""
        can_run, verdict = False, f"it cannot be run here: {reason}"
    problems = sum(concern.severity is Severity.PROBLEM for concern in misuse)
    if problems:
        verdict += f"; {problems} problem(s) with the checkpoint, see below"
    return DoctorReceipt(
        model=model,
        can_run=can_run,
        verdict=verdict,
        machine=machine,
        tools=tools,
        environment_concerns=environment_concerns,
        checkpoint=summary,
        concerns=misuse,
        engines=engines,
        fit=fit,
        seconds=time.perf_counter() - begin,
        environment=this_environment(),
    )
