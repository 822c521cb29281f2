"""All figures of one loaded model: checks first, then speed; with a red check, no speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from omnifp4.benchmark.checks import check_engine
from omnifp4.benchmark.clock import forget_peak, free_memory, peak_bytes
from omnifp4.benchmark.parts import part_bytes, weights_text
from omnifp4.benchmark.progress import Steps
from omnifp4.benchmark.reference import Reference
from omnifp4.benchmark.roofline import bound, count_traffic, step_bytes, uniform_experts
from omnifp4.benchmark.settings import CHECK_TOKENS, WARM_STEPS, Settings
from omnifp4.benchmark.speed import DecodeTiming, time_decode, time_prefill
from omnifp4.benchmark.subject import Loaded, Subject
from omnifp4.benchmark.tiers import judge_tiers
from omnifp4.decoding import Engine, EngineFull, choose_engine
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.bench import (
    BenchMemory,
    CacheRow,
    DecodeRow,
    Measured,
    PrefillRow,
    RoutingRow,
    SpeechRow,
    Traffic,
)
from omnifp4.receipt.verification import Check

CHECKED_TOKENS = 20_000
"""At one context, larger batches are checked up to so many tokens of prompts; the smallest is always."""
SPEECH_CONTEXT = 512


def figures(settings: Settings) -> int:
    """Steps that `measure` tells of."""
    decode = len(settings.context) * (1 + len(settings.batch))
    return decode + len(settings.prefill) + (settings.parts == "all")


@dataclass
class _Found:
    """What is known so far."""

    checks: list[Check] = field(default_factory=list)
    distinct: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By batch: distinct experts a layer and step, and the context where they were counted."""
    timings: dict[tuple[int, int], tuple[str, DecodeTiming]] = field(default_factory=dict)
    """By context and batch: the engine's name, and what it did."""
    prefill: list[PrefillRow] = field(default_factory=list)
    speech: SpeechRow | None = None
    engine: str = ""
    reason: str = ""

    @property
    def red(self) -> bool:
        return any(check.verdict is not Verdict.PASS for check in self.checks)


def measure(
    subject: Subject,
    loaded: Loaded,
    settings: Settings,
    *,
    engine: str,
    bytes_per_second: float,
    device: torch.device,
    steps: Steps,
) -> Measured:
    """Measures a loaded model.

    Args:
        subject: what it is.
        loaded: the model, with what loading it took.
        settings: what to measure.
        engine: as `choose_engine` takes it.
        bytes_per_second: copy bandwidth of the device.
        device: of the model.
        steps: is told of each figure.

    Raises:
        OmniFP4Error: a context does not fit the model, or a batch not the engine.
    """
    model = loaded.model
    text = model.config.thinker_config.text_config
    settings.check_context(int(text.max_position_embeddings))
    forget_peak(device)
    found = _Found()
    for context in settings.context:
        if not found.red:
            _measure_context(model, found, settings, engine, context, device, steps)
    if not found.red:
        _measure_prompts(model, found, settings, engine, device, steps)
    if found.red:
        found.timings, found.prefill, found.speech = {}, [], None
    traffic = count_traffic(model)
    routing = _routing(found, settings, text) if traffic.layers else ()
    decode = _decode_rows(found, traffic, routing, bytes_per_second)
    single = next((row.tokens_per_second for row in decode if row.batch == 1), None)
    weights = part_bytes(model)
    return Measured(
        model=subject.name,
        weights=weights_text(model),
        layers=int(text.num_hidden_layers),
        engine=found.engine,
        engine_reason=found.reason,
        load_seconds=loaded.load_seconds,
        make_seconds=loaded.make_seconds,
        memory=BenchMemory(
            weights=weights,
            weight_bytes=sum(weights.values()),
            loading_peak_bytes=loaded.peak_bytes,
            peak_bytes=peak_bytes(device),
        ),
        checks=tuple(found.checks),
        traffic=traffic,
        routing=routing,
        prefill=tuple(found.prefill),
        decode=decode,
        cache=_cache_rows(decode, traffic, bytes_per_second),
        speech=found.speech,
        tiers=judge_tiers(weights, single.median if single else None, _no_tier(subject, found)),
    )


def _no_tier(subject: Subject, found: _Found) -> str:
    if found.red:
        return "a check failed"
    if subject.layers is not None:
        return f"the model is cut to {subject.layers} layer(s)"
    return ""


@contextmanager
def _engine(
    model: Any, requested: str, *, most_sequences: int, context_tokens: int, device: torch.device
) -> Iterator[Engine]:
    free_memory(device)
    engine = choose_engine(model, requested, most_sequences=most_sequences, context_tokens=context_tokens)
    try:
        if engine.most_sequences < most_sequences:
            raise OmniFP4Error(
                f"a batch of {most_sequences} is more than the engine {engine.name} takes at once",
                hint=f"--batch up to {engine.most_sequences}",
            )
        yield engine
    finally:
        engine.close()


def _measure_context(
    model: Any, found: _Found, settings: Settings, requested: str, context: int, device: torch.device, steps: Steps
) -> None:
    waiting = list(settings.batch)
    tokens = max(settings.decode_tokens(context), context + CHECK_TOKENS)
    while waiting:
        try:
            with _engine(model, requested, most_sequences=waiting[-1], context_tokens=tokens, device=device) as engine:
                found.engine, found.reason = found.engine or engine.name, found.reason or engine.reason
                _measure_batches(model, found, settings, engine, waiting, context, device, steps)
            return
        except (EngineFull, torch.OutOfMemoryError) as error:
            # The largest batch finds no memory for its cache; the others may.
            batch = waiting.pop()
            steps.begin(f"batch {batch}, context {context}: no memory")
            told = "not enough memory for the cache" if isinstance(error, torch.OutOfMemoryError) else str(error)
            found.timings[context, batch] = (requested, DecodeTiming(None, 0, float(context), told))


def _measure_batches(
    model: Any,
    found: _Found,
    settings: Settings,
    engine: Engine,
    batches: list[int],
    context: int,
    device: torch.device,
    steps: Steps,
) -> None:
    steps.begin(f"check at context {context}")
    # The modules run one sequence after the other, so that a batch is nothing new to them.
    most = 0 if engine.name == "modules" else CHECKED_TOKENS
    checked = [batch for batch in batches if batch == batches[0] or batch * context <= most]
    judged = check_engine(model, engine, batches=checked, context=context, seed=settings.seed, device=device)
    found.checks += judged.checks
    for batch, distinct in judged.distinct.items():
        found.distinct.setdefault(batch, (distinct, context))
    if not judged.passed:
        return
    for batch in batches:
        steps.begin(f"decode, batch {batch}, context {context}")
        timing = time_decode(model.config, engine, batch, context, settings, device)
        found.timings[context, batch] = (engine.name, timing)
        if batch not in found.distinct and timing.made:
            experts = getattr(model.config.thinker_config.text_config, "num_experts", 0)
            counted = Reference(model, timing.made).distinct_experts(range(batch), experts)
            if counted is not None:
                found.distinct[batch] = (counted, context)


def _measure_prompts(
    model: Any, found: _Found, settings: Settings, requested: str, device: torch.device, steps: Steps
) -> None:
    longest = max(settings.prefill[-1] + WARM_STEPS, SPEECH_CONTEXT)
    with _engine(model, requested, most_sequences=1, context_tokens=longest, device=device) as engine:
        for tokens in settings.prefill:
            steps.begin(f"prompt of {tokens} tokens")
            found.prefill.append(time_prefill(model.config, engine, tokens, settings, device))
        if settings.parts == "all":
            from omnifp4.benchmark.speech import time_speech

            steps.begin("speech")
            found.speech = time_speech(model, engine, settings, device)


def _routing(found: _Found, settings: Settings, text: Any) -> tuple[RoutingRow, ...]:
    rows = []
    for batch in settings.batch:
        uniform = uniform_experts(text.num_experts, text.num_experts_per_tok, batch)
        distinct, context = found.distinct.get(batch, (uniform, 0))
        how = (
            f"counted over {CHECK_TOKENS - 1} steps and all layers, context {context}" if context else "uniform routing"
        )
        rows.append(
            RoutingRow(batch=batch, distinct_experts=distinct, uniform_experts=uniform, measured=bool(context), how=how)
        )
    return tuple(rows)


def _decode_rows(
    found: _Found, traffic: Traffic, routing: tuple[RoutingRow, ...], bytes_per_second: float
) -> tuple[DecodeRow, ...]:
    experts = {row.batch: row.distinct_experts for row in routing}
    rows = []
    for (context, batch), (engine, timing) in sorted(found.timings.items()):
        size = step_bytes(traffic, batch=batch, experts=experts.get(batch, 0.0), context=timing.mean_context)
        limit = bound(size, batch, bytes_per_second)
        speed = timing.tokens_per_second
        rows.append(
            DecodeRow(
                batch=batch,
                prompt_tokens=context,
                engine=engine,
                new_tokens=timing.new_tokens,
                mean_context=timing.mean_context,
                tokens_per_second=speed,
                step_bytes=size,
                bound_tokens_per_second=limit,
                fraction=speed.median / limit if speed else None,
                not_measured=timing.not_measured,
            )
        )
    return tuple(rows)


def _cache_rows(decode: tuple[DecodeRow, ...], traffic: Traffic, bytes_per_second: float) -> tuple[CacheRow, ...]:
    """Each longer context against the shortest, batch by batch."""
    first: dict[int, DecodeRow] = {}
    rows = []
    for row in decode:
        if row.tokens_per_second is None:
            continue
        base = first.setdefault(row.batch, row)
        if base is row or base.tokens_per_second is None:
            continue
        extra = round(row.batch * (row.mean_context - base.mean_context) * traffic.cache_token)
        seconds = row.batch / row.tokens_per_second.median - row.batch / base.tokens_per_second.median
        rate = extra / seconds if seconds > 0 else None
        rows.append(
            CacheRow(
                batch=row.batch,
                from_tokens=base.prompt_tokens,
                to_tokens=row.prompt_tokens,
                extra_bytes=extra,
                extra_seconds=seconds,
                bytes_per_second=rate,
                fraction=rate / bytes_per_second if rate else None,
            )
        )
    return tuple(rows)
