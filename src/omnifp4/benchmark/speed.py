"""Timing of an engine: the first token of a prompt, and decoding at a batch and a context."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Final

import torch

from omnifp4.benchmark.clock import now, spread
from omnifp4.benchmark.prompts import make_prompt
from omnifp4.benchmark.reference import Continuation
from omnifp4.benchmark.settings import CHECK_TOKENS, WARM_STEPS, Settings
from omnifp4.decoding import Engine, EngineFull, Sampling, Sequence
from omnifp4.receipt.bench import PrefillRow, Spread

LEAST_STEPS: Final = 2
"""Of a repeat, however slow the engine is."""
WARM_SHARE: Final = 0.1
"""Of the allowed time that warming up may take beyond its first steps."""
FILL_SHARE: Final = 2.0
"""Times the allowed seconds that reading the prompts once may take."""


@dataclass(frozen=True)
class DecodeTiming:
    """One batch at one context.

    Attributes:
        tokens_per_second: of all sequences; None if not measured.
        new_tokens: of each sequence in a repeat.
        mean_context: tokens in the cache before a step, mean over what was timed.
        not_measured: why; empty if it was.
        made: the prompts and the first new tokens of the last repeat.
    """

    tokens_per_second: Spread | None
    new_tokens: int
    mean_context: float
    not_measured: str = ""
    made: tuple[Continuation, ...] = ()


def time_prefill(config: Any, engine: Engine, tokens: int, settings: Settings, device: torch.device) -> PrefillRow:
    """Time to the first token of one prompt, its ids already on the device."""
    prompts = [
        make_prompt(config, tokens, seed=settings.seed + number, device=device)
        for number in range(settings.repeats + 1)
    ]
    seconds: list[float] = []
    try:
        for prompt in prompts:
            begin = now(device)
            one = engine.start(prompt, Sampling(), most_tokens=WARM_STEPS)
            seconds.append(now(device) - begin)
            engine.stop(one)
    except (EngineFull, torch.OutOfMemoryError) as error:
        return PrefillRow(
            prompt_tokens=tokens, engine=engine.name, first_token_seconds=None, tokens_per_second=None, not_measured=_reason(error)
        )  # fmt: skip
    # The first warmed up.
    timed = seconds[1:]
    return PrefillRow(
        prompt_tokens=tokens, engine=engine.name, first_token_seconds=spread(timed),
        tokens_per_second=spread(tokens / one for one in timed),
    )  # fmt: skip


def time_decode(
    config: Any, engine: Engine, batch: int, context: int, settings: Settings, device: torch.device
) -> DecodeTiming:
    """Decoding speed of `batch` sequences after prompts of `context` tokens.

    Each repeat starts anew, unless reading the prompts again would take too long: then the repeats follow each other
    within one text of as many new tokens. An engine that is too slow makes fewer tokens; the outcome says how many.
    """
    prompts = [make_prompt(config, context, seed=settings.seed + number, device=device) for number in range(batch)]
    try:
        return _time_decode(engine, prompts, context, settings, device)
    except (EngineFull, torch.OutOfMemoryError) as error:
        return DecodeTiming(None, 0, float(context), _reason(error))


def _time_decode(
    engine: Engine, prompts: Many[Any], context: int, settings: Settings, device: torch.device
) -> DecodeTiming:
    room = settings.new_tokens + WARM_STEPS + 1
    batch, repeats, allowed = len(prompts), settings.repeats, settings.cell_seconds
    under_way: list[Sequence] = []
    try:
        begin = now(device)
        under_way.append(engine.start(prompts[0], Sampling(), most_tokens=room))
        filling = (now(device) - begin) * batch
        if filling > FILL_SHARE * allowed:
            told = f"reading the prompts would take {filling:.0f} s, more than twice --cell-seconds {allowed:g}"
            return DecodeTiming(None, 0, float(context), told)
        under_way += [engine.start(prompt, Sampling(), most_tokens=room) for prompt in prompts[1:]]
        filling = now(device) - begin
        warm = LEAST_STEPS
        step_seconds = _run(engine, under_way, warm, device) / warm
        if step_seconds * WARM_STEPS < WARM_SHARE * allowed:
            step_seconds = _run(engine, under_way, WARM_STEPS - warm, device) / (WARM_STEPS - warm)
            warm = WARM_STEPS
        affordable = max(LEAST_STEPS, int(allowed / repeats / step_seconds))
        anew = filling * repeats <= allowed
        steps = min(affordable, settings.new_tokens if anew else settings.new_tokens // repeats)
        seconds: list[float] = []
        for _ in range(repeats):
            if anew:
                _stop(engine, under_way)
                under_way = []
                under_way += [engine.start(prompt, Sampling(), most_tokens=room) for prompt in prompts]
            seconds.append(_run(engine, under_way, steps, device))
        made = tuple(
            Continuation(prompt.tensors["input_ids"][0], tuple(one.tokens[: CHECK_TOKENS + 1]))
            for prompt, one in zip(prompts, under_way, strict=True)
        )
    finally:
        _stop(engine, under_way)
    timed = steps if anew else steps * repeats
    mean = context + (0 if anew else warm) + (timed - 1) / 2
    return DecodeTiming(spread(batch * steps / one for one in seconds), steps, mean, made=made)


def _run(engine: Engine, under_way: list[Sequence], steps: int, device: torch.device) -> float:
    begin = now(device)
    for _ in range(steps):
        engine.step(under_way)
    return now(device) - begin


def _stop(engine: Engine, under_way: list[Sequence]) -> None:
    for one in under_way:
        engine.stop(one)


def _reason(error: Exception) -> str:
    return "not enough memory on the device" if isinstance(error, torch.OutOfMemoryError) else str(error)
