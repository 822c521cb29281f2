"""Whether an engine can serve an artifact here: the doctor's rules, asked of the engine's own environment."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.doctor import engine_rules as rules
from omnifp4.doctor.engines import judge_engines
from omnifp4.doctor.facts import Facts, Kind, read_facts
from omnifp4.doctor.fit import fit_model
from omnifp4.doctor.machine import TORCH_PROBE, TORCH_TIMEOUT_S, look_at_machine
from omnifp4.doctor.misuse import find_misuse
from omnifp4.doctor.packages import Installed
from omnifp4.doctor.question import Question
from omnifp4.doctor.reading import unread_schemes
from omnifp4.doctor.soundness import check_structure
from omnifp4.errors import OmniFP4Error
from omnifp4.handover.environments import EngineEnvironment
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.doctor import Ability, Accelerator, EngineRow, Machine, Tool

TITLES: Final = {"vllm": rules.VLLM, "vllm-omni": rules.VLLM_OMNI}
MARLIN_HIDDEN: Final = 64
"""Marlin's experts take no hidden width but a multiple of it; other widths it pads (vLLM 0.26)."""
MARLIN_TILE: Final = (64, 128)
"""Output and input widths that need no padding."""
TALKER_LAYER: Final = 24
ROLE_IDS: Final = {"system_token_id": 8948, "user_token_id": 872, "assistant_token_id": 77091}
"""Numbers of the released Qwen3-Omni that vLLM-Omni 0.26 has in its code, where it should read the config."""


@dataclass(frozen=True, slots=True)
class Judged:
    """An artifact, the machine, and what the engine makes of both.

    Attributes:
        facts: of the artifact as it will be served.
        row: the doctor's judgement of the engine.
        machine: GPUs as the driver knows them.
        folder: what is handed to the engine: a local folder, or a Hub id.
        notes: worth knowing.
    """

    facts: Facts
    row: EngineRow
    machine: Machine
    folder: str
    notes: tuple[str, ...]


def this_machine(python: Path | None = None) -> Machine:
    """Memory and GPUs as the driver's tool tells them; where there is none, as the torch of `python` does.

    Our own torch is not asked: it is not the engine's.
    """
    machine = look_at_machine("")
    if machine.accelerators or python is None:
        return machine
    try:
        done = subprocess.run(
            [str(python), "-c", TORCH_PROBE], capture_output=True, timeout=TORCH_TIMEOUT_S, check=False
        )
        devices = json.loads(done.stdout.strip().rpartition(b"\n")[2])["devices"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        # A torch that does not import is told by the engine itself, with its cause.
        return machine
    found = (
        Accelerator(name=name, memory_bytes=total, free_bytes=free, compute_capability=capability)
        for name, total, free, capability in devices
    )
    return machine.model_copy(update={"accelerators": tuple(found)})


def judge(model: str, engine: str, environment: EngineEnvironment, machine: Machine) -> Judged:
    """Ask the doctor's rules about `model` in `engine`, with the versions of `environment`. Reads headers only."""
    facts = read_facts(model)
    tools = tuple(Tool(name=name, version=environment.version(name)) for name in ("vllm", *environment.versions))
    checks = check_structure(facts)
    fit = fit_model(facts, machine)
    question = Question(model, facts, checks, machine, Installed(tools), fit, None, find_misuse(facts))
    row = next(row for row in judge_engines(question) if row.engine == TITLES[engine])
    unsure = [check.summary for check in checks if check.verdict is Verdict.NOT_CHECKED]
    return Judged(facts, row, machine, model, (*row.reasons, *unsure))


def needs_conversion(judged: Judged) -> str:
    """Why the artifact must be converted to compressed-tensors first; empty if it need not."""
    if judged.row.artifact is not Ability.CANNOT or not (judged.facts.kind is Kind.NVFP4 or judged.facts.coded):
        return ""
    command = rules.CONVERT.partition("{model}")[0]
    if judged.facts.dialect == "compressed-tensors" or not judged.row.fix.startswith(command):
        return ""
    return judged.row.reasons[0]


def unread_notes(facts: Facts, environment: EngineEnvironment) -> list[str]:
    """What of the artifact nobody here saw this version of the engine read, though it may."""
    version = environment.version("vllm") or rules.NEWEST["vllm"]
    return [reason for ability, reason, _ in unread_schemes(facts, version) if ability is Ability.NOT_KNOWN]


def require_readable(judged: Judged) -> None:
    """Raises OmniFP4Error if the engine cannot read the artifact, wherever it runs."""
    if judged.row.artifact is Ability.CANNOT:
        raise OmniFP4Error(f"{judged.folder}: {judged.row.engine} cannot read it: {judged.row.reasons[0]}", hint=judged.row.fix)  # fmt: skip
    if judged.row.original is Ability.CANNOT:
        raise OmniFP4Error(f"{judged.folder}: {judged.row.reasons[0]}", hint=judged.row.fix)


def require_runnable(judged: Judged) -> None:
    """Raises OmniFP4Error if the engine cannot run here: versions, GPU, memory."""
    if judged.row.ability is Ability.CANNOT:
        raise OmniFP4Error(f"{judged.row.engine} cannot run here: {judged.row.reasons[0]}", hint=judged.row.fix)


def conversion_folder(cache: Path, facts: Facts) -> Path:
    """Where the converted copy of an artifact stands: its name, and a fingerprint of its headers and its files' times."""
    place = facts.checkpoint.folder
    name = place.resolve().name if place is not None else facts.checkpoint.location.replace("/", "--")
    identity = f"{headers_sha256(facts.checkpoint)} {sorted(file_stamps(facts.checkpoint).items())}"
    return cache / "converted" / f"{name}-{sha256(identity.encode()).hexdigest()[:12]}-compressed-tensors"


def capability(machine: Machine) -> str:
    """Compute capability of the first GPU; empty without one."""
    return machine.accelerators[0].compute_capability if machine.accelerators else ""


def experts_are_fp4(facts: Facts, part: str) -> bool:
    """Whether every expert of a part (``talker`` or another) is stored as codes; without experts False."""
    return any(".experts." in module and module.startswith("talker.") == (part == "talker") for module in facts.fp4)


def marlin_problem(facts: Facts) -> str:
    """Why Marlin cannot run the experts; empty if it can."""
    for module, linear in facts.fp4.items():
        if ".experts." in module and not module.endswith("down_proj"):
            hidden = 2 * linear.packed.shape[1]
            if hidden % MARLIN_HIDDEN:
                return f"{module}: hidden width {hidden} is no multiple of {MARLIN_HIDDEN}, which Marlin's experts need"
    return ""


def marlin_padding(facts: Facts) -> str:
    """The first linear whose widths Marlin pads; empty if there is none."""
    for module, linear in facts.fp4.items():
        rows, columns = linear.packed.shape[0], 2 * linear.packed.shape[1]
        if rows % MARLIN_TILE[0] or columns % MARLIN_TILE[1]:
            return (
                f"{module} is {rows} x {columns}: Marlin pads what is no multiple of {MARLIN_TILE[0]} x {MARLIN_TILE[1]}, "
                "which costs time; vLLM before 0.26 may refuse it"
            )
    return ""


def speech_problem(facts: Facts) -> str:
    """Why vLLM-Omni may not speak with this model although it loads it; empty if nothing is known."""
    layer = facts.config.get("talker_config", {}).get("accept_hidden_layer")
    told = [] if layer in (None, TALKER_LAYER) else [f"accept_hidden_layer {layer}, not {TALKER_LAYER}"]
    for name, number in ROLE_IDS.items():
        if facts.config.get(name, number) != number:
            told.append(f"{name} {facts.config[name]}, not {number}")
    if not facts.speaks or not told:
        return ""
    return f"vLLM-Omni 0.26 knows the released model's numbers only, so speech may fail: {', '.join(told)}"
