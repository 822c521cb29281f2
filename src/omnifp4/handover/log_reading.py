"""What an engine's own log says: kernels that are really used, memory, and how far the start is.

The lines are those of vLLM 0.20 to 0.32 (read in their sources).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from omnifp4.receipt.handover import KernelUse, StageMemory

ANSI: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
EXPERTS: Final = re.compile(r"Using '([\w-]+)' (?:NvFp4|Unquantized|Fp8)? ?MoE backend", re.IGNORECASE)
LINEARS: Final = re.compile(r"Using (\w+) for NVFP4 GEMM")
ATTENTION: Final = re.compile(r"Using (?:AttentionBackendEnum\.)?(\w+) attention backend\b")
WEIGHT_ONLY: Final = "does not have native support for FP4 computation"
FALL_BACK: Final = re.compile(r"NVFP4 linear falling back to the slow and unoptimized emulation")
WEIGHTS: Final = re.compile(r"Model loading took ([\d.]+) Gi?B")
CACHE: Final = re.compile(r"Available KV cache memory: ([\d.]+) Gi?B")
TOKENS: Final = re.compile(r"GPU KV cache size: ([\d,]+) tokens")
STAGE: Final = re.compile(r"[Ss]tage[-_ ]?(\d)")
PROCESS: Final = re.compile(r"^\(([\w-]+)(?: pid=\d+)?\)")

STEPS: Final = (
    (re.compile(r"Application startup complete|Uvicorn running"), "ready"),
    (re.compile(r"Captur\w+ .*(CUDA )?graph|Graph captur"), "capturing graphs"),
    (re.compile(r"torch\.compile|Dynamo bytecode|Compiling a graph|Compiling"), "compiling"),
    (re.compile(r"Available KV cache|KV cache size|profil", re.IGNORECASE), "measuring memory"),
    (
        re.compile(r"Loading (safetensors|weights)|Loading.*shards|Model loading took|Starting to load"),
        "loading weights",
    ),
    (re.compile(r"Initializing a V\d|Starting vLLM|vLLM (API server|version)|non-default args"), "starting"),
)
"""Lines that tell how far a start is, the farthest first."""
SHARDS: Final = re.compile(r"Loading \w+ checkpoint shards:\s+(\d+)%")


def plain(line: str) -> str:
    """A line of a log without colours."""
    return ANSI.sub("", line).rstrip()


def step_of(line: str) -> str:
    """What the engine is at, by one line of its log; empty if the line does not tell."""
    if found := SHARDS.search(line):
        return f"loading weights, {found.group(1)}%"
    return next((name for pattern, name in STEPS if pattern.search(line)), "")


def kernels_used(lines: Iterable[str]) -> tuple[KernelUse, ...]:
    """Every kernel that the log names, each once. Arithmetic: Marlin is FP4 weights with BF16 activations."""
    found: dict[tuple[str, str], KernelUse] = {}
    weight_only = False
    for raw in lines:
        line = plain(raw)
        weight_only = weight_only or WEIGHT_ONLY in line
        for part, pattern in (("experts", EXPERTS), ("linears", LINEARS), ("attention", ATTENTION)):
            match = pattern.search(line)
            if match and (part, match.group(1)) not in found:
                name = match.group(1)
                found[part, name] = KernelUse(
                    part=part,
                    kernel=name,
                    arithmetic=_arithmetic(part, name, line),
                    slow=_is_slow(name),
                    line=line[-300:],
                )
        if FALL_BACK.search(line):
            found["linears", "fall-back"] = KernelUse(
                part="linears", kernel="emulation", arithmetic="emulated", slow=True, line=line[-300:]
            )
    return tuple(found.values())


def _arithmetic(part: str, name: str, line: str) -> str:
    lowered = name.lower()
    if part == "attention" or (part == "experts" and "nvfp4" not in line.lower()):
        return ""
    if "marlin" in lowered or "humming" in lowered:
        return "W4A16"
    if "emulation" in lowered:
        return "emulated"
    return "W4A4" if "flashinfer" in lowered or "cutlass" in lowered or "b12x" in lowered else ""


def _is_slow(name: str) -> bool:
    return "emulation" in name.lower()


def memory_told(lines: Iterable[str]) -> tuple[StageMemory, ...]:
    """What each stage (or the one engine) said of its memory, in order of first mention."""
    told: dict[str, dict[str, float | int]] = {}
    for raw in lines:
        line = plain(raw)
        for name, pattern in (("weights_gib", WEIGHTS), ("cache_gib", CACHE), ("cache_tokens", TOKENS)):
            if match := pattern.search(line):
                number = match.group(1).replace(",", "")
                value = int(number) if name == "cache_tokens" else float(number)
                told.setdefault(_stage_of(line), {}).setdefault(name, value)
    return tuple(StageMemory.model_validate({"stage": stage, **values}) for stage, values in told.items())


def _stage_of(line: str) -> str:
    if match := STAGE.search(line):
        return f"stage {match.group(1)}"
    match = PROCESS.search(line)
    return match.group(1) if match else "engine"
