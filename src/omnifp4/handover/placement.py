"""How the GPUs that are here are shared: tensor and expert parallel, stages on GPUs, memory and context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any, Final

from omnifp4.doctor.facts import SPEECH, TEXT, TOWERS, Facts
from omnifp4.doctor.fit import WEIGHT_ROOM, gb, read_sizes
from omnifp4.errors import OmniFP4Error
from omnifp4.handover.options import Options
from omnifp4.receipt.doctor import Accelerator, Machine

UTILIZATION: Final = 0.9
"""Share of a GPU that an engine takes; vLLM's own default."""
FREE_MARGIN: Final = 0.02
"""Share that is left beside what other programs hold: vLLM refuses to start if less is free than it was told to take."""
ENGINE_ROOM_BYTES: Final = 4_000_000_000
"""On each GPU: CUDA context, activations of a prefill chunk and captured graphs (an estimate)."""
CODE2WAV_SHARE: Final = 0.1
"""Of a GPU, as vLLM-Omni's own deploy file has it."""
TALKER_TOKENS: Final = 65_536
"""Of key/value cache that the talker is given room for, where it shares a GPU with the thinker."""
UNKNOWN_CONTEXT: Final = 32_768
"""Context where no GPU is here to tell."""
LEAST_CONTEXT: Final = 1024
CONTEXT_STEP: Final = 1024
EXPERT_TILE: Final = 64
"""Marlin pads the width of a share of an expert to a multiple of it (vLLM 0.26); whole experts are spread instead."""


@dataclass(frozen=True, slots=True)
class StagePlace:
    """One stage of vLLM-Omni.

    Attributes:
        stage: 0 thinker, 1 talker, 2 code2wav.
        devices: GPUs by number.
        utilization: share of each of them.
    """

    stage: int
    devices: tuple[int, ...]
    utilization: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything goes.

    Attributes:
        tensor_parallel: GPUs that share the text decoder.
        expert_parallel: experts are spread whole over them, not each one divided.
        utilization: of the thinker's GPUs.
        context_tokens: longest sequence.
        stages: for vLLM-Omni.
        reasons: why so, one line each.
    """

    tensor_parallel: int
    expert_parallel: bool
    utilization: float
    context_tokens: int
    stages: tuple[StagePlace, ...]
    reasons: tuple[str, ...]


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    thinker = config.get("thinker_config", config)
    text = thinker.get("text_config", thinker)
    return text if isinstance(text, dict) else {}


def head_counts(facts: Facts) -> list[int]:
    """Numbers of heads that tensor parallelism must divide: the decoder's, and those of towers that are loaded."""
    config = facts.config
    counts = [_text_config(config).get("num_attention_heads")]
    thinker = config.get("thinker_config", config)
    if TOWERS in facts.parts:
        counts.append((thinker.get("audio_config") or {}).get("encoder_attention_heads"))
        counts.append((thinker.get("vision_config") or {}).get("num_heads"))
    return [count for count in counts if isinstance(count, int) and count > 0]


def can_divide(facts: Facts, size: int) -> bool:
    """Whether `size` GPUs can share the decoder: every head count divides, key heads divide or are repeated."""
    keys = _text_config(facts.config).get("num_key_value_heads")
    keys_fit = not isinstance(keys, int) or keys % size == 0 or size % keys == 0
    return keys_fit and all(count % size == 0 for count in head_counts(facts))


def choose_parallel(facts: Facts, gpus: int, asked: int | None) -> tuple[int, bool, list[str]]:
    """Tensor parallel size, whether experts are spread whole, and the reasons.

    Raises:
        OmniFP4Error: what was asked for does not divide the model.
    """
    counts = ", ".join(map(str, head_counts(facts)))
    if asked is not None and not can_divide(facts, asked):
        raise OmniFP4Error(
            f"tensor parallel size {asked} does not divide the model's heads ({counts})",
            hint=f"sizes that do: {', '.join(str(n) for n in range(1, 17) if can_divide(facts, n))}",
        )
    size = asked or max((n for n in range(1, max(1, gpus) + 1) if can_divide(facts, n)), default=1)
    reasons = []
    if size > 1 or gpus > 1:
        why = "as asked for" if asked else f"the most of {gpus} GPU(s) that divides the heads ({counts})"
        reasons.append(f"tensor parallel over {size} GPU(s): {why}")
    if asked is None and gpus > size:
        reasons.append(f"{gpus - size} GPU(s) stay free: a second server there doubles the rate")
    text = _text_config(facts.config)
    inner, experts = text.get("moe_intermediate_size"), text.get("num_experts")
    spread = (
        size > 1
        and isinstance(inner, int)
        and isinstance(experts, int)
        and (inner % size != 0 or (inner // size) % EXPERT_TILE != 0)
        and experts % size == 0
    )
    if spread:
        reasons.append(
            f"expert parallel: {inner} / {size} is no multiple of {EXPERT_TILE}, so experts are spread whole, {experts} / {size} a GPU"
        )
    return size, spread, reasons


def place(facts: Facts, machine: Machine, engine: str, options: Options) -> Placement:
    """Decide where everything goes, from the GPUs that are here (one of unknown size if there is none).

    Raises:
        OmniFP4Error: the weights do not fit, or what was asked for does not divide the model.
    """
    gpus = machine.accelerators
    if engine == "vllm":
        size, spread, reasons = choose_parallel(facts, len(gpus), options.tensor_parallel)
        if gpus and size > len(gpus):
            reasons.append(f"{size - len(gpus)} GPU(s) of other hosts are taken to be like those here")
            gpus += (gpus[-1],) * (size - len(gpus))
        share = _utilization(gpus[:size], options, reasons)
        weights = facts.checkpoint.weight_bytes - facts.parts.get(SPEECH, 0)
        context = _context(facts, weights, gpus[:size], share, size, options, reasons)
        return Placement(size, spread, share, context, (), tuple(reasons))
    return _place_stages(facts, gpus, options)


def _place_stages(facts: Facts, gpus: tuple[Accelerator, ...], options: Options) -> Placement:
    """Thinker on the first GPUs, talker and code2wav on the last."""
    speaks = facts.speaks and facts.config.get("enable_audio_output", True) is True
    behind = 0 if not speaks or len(gpus) < 2 else 1 if len(gpus) < 4 else 2
    size, spread, reasons = choose_parallel(facts, max(1, len(gpus) - behind), options.tensor_parallel)
    if size + behind > max(1, len(gpus)):
        raise OmniFP4Error(
            f"tensor parallel size {size} leaves none of {len(gpus)} GPU(s) for the talker", hint="ask for fewer"
        )
    share = _utilization(gpus, options, reasons)
    first = tuple(range(size))
    thinker, stages = share, []
    if speaks:
        talker, sound = (size, size + behind - 1) if behind else (0, 0)
        talker_share = _talker_share(facts, gpus[talker] if gpus else None, share)
        if behind == 0:
            thinker = round(share - talker_share - CODE2WAV_SHARE, 3)
            reasons.append("one GPU holds all three stages: its memory is divided by their weights and caches")
        elif behind == 1:
            talker_share = round(share - CODE2WAV_SHARE, 3)
            reasons.append(f"pipeline by stage: thinker on GPU {_names(first)}, talker and code2wav on GPU {talker}")
        else:
            talker_share = share
            reasons.append(
                f"pipeline by stage: thinker on GPU {_names(first)}, talker on GPU {talker}, code2wav on GPU {sound}"
            )
        stages = [StagePlace(1, (talker,), talker_share), StagePlace(2, (sound,), CODE2WAV_SHARE)]
    weights = facts.checkpoint.weight_bytes - facts.parts.get(SPEECH, 0)
    context = _context(facts, weights, gpus[:size], thinker, size, options, reasons)
    return Placement(size, spread, thinker, context, (StagePlace(0, first, thinker), *stages), tuple(reasons))


def _names(devices: tuple[int, ...]) -> str:
    return ", ".join(map(str, devices))


def _talker_share(facts: Facts, gpu: Accelerator | None, share: float) -> float:
    """What the talker needs of a GPU that it shares with the thinker."""
    if gpu is None:
        return round(share / 4, 3)
    _, talker = read_sizes(facts.config)
    cache = TALKER_TOKENS * talker.kv_bytes_per_token if talker is not None else 0
    needed = facts.parts.get(SPEECH, 0) * WEIGHT_ROOM + cache + ENGINE_ROOM_BYTES
    return min(round(share / 2, 3), round(needed / gpu.memory_bytes + 0.005, 3))


def _utilization(gpus: tuple[Accelerator, ...], options: Options, reasons: list[str]) -> float:
    """Share of each GPU: as asked for, or the usual one, or what other programs leave."""
    if options.gpu_memory_utilization is not None:
        return options.gpu_memory_utilization
    free = [gpu.free_bytes / gpu.memory_bytes for gpu in gpus if gpu.free_bytes is not None and gpu.memory_bytes]
    least = min(free, default=1.0) - FREE_MARGIN
    if least >= UTILIZATION:
        return UTILIZATION
    reasons.append(f"GPU memory utilization {least:.2f}: other programs hold the rest")
    return max(0.05, floor(least * 100 + 1e-6) / 100)


def _context(
    facts: Facts,
    weights: int,
    gpus: tuple[Accelerator, ...],
    share: float,
    size: int,
    options: Options,
    reasons: list[str],
) -> int:
    """Longest sequence that the key/value cache holds, at most the model's own; raises OmniFP4Error if none fits."""
    text, _ = read_sizes(facts.config)
    limit = text.context if text is not None else 0
    if options.max_model_len is not None:
        if limit and options.max_model_len > limit:
            raise OmniFP4Error(f"context length {options.max_model_len:,} is more than the model's {limit:,}")
        return options.max_model_len
    if not gpus or text is None or not text.kv_bytes_per_token:
        reasons.append("no GPU was seen: context and memory are defaults; print it again on the machine that serves")
        return min(limit or UNKNOWN_CONTEXT, UNKNOWN_CONTEXT)
    room = sum(int(gpu.memory_bytes * share) - ENGINE_ROOM_BYTES for gpu in gpus)
    left = room - int(weights * WEIGHT_ROOM)
    tokens = left // text.kv_bytes_per_token
    if tokens < LEAST_CONTEXT:
        raise OmniFP4Error(
            f"{gb(weights)} of weights and a context of {LEAST_CONTEXT:,} tokens do not fit {share:.0%} of {size} GPU(s), "
            f"{gb(sum(gpu.memory_bytes for gpu in gpus))} in all",
            hint="a larger GPU, more of them, or NVFP4 where the weights are wide: omnifp4 doctor MODEL",
        )
    chosen = min(tokens // CONTEXT_STEP * CONTEXT_STEP, limit) if limit else tokens // CONTEXT_STEP * CONTEXT_STEP
    decoder = facts.parts.get(TEXT, 0)
    reasons.append(
        f"context {chosen:,}: {gb(left)} beside {gb(weights)} of weights ({gb(decoder)} of them the text decoder) hold {tokens:,} "
        f"tokens of {text.kv_bytes_per_token:,} bytes, the model's own limit is {limit:,}"
    )
    return chosen
