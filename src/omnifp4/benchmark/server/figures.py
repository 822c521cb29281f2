"""From outcomes to figures: percentiles, rates and errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil
from typing import TYPE_CHECKING

from omnifp4.benchmark.server.trace import Kind, TraceOptions
from omnifp4.receipt.base import this_environment
from omnifp4.receipt.server_load import KindFigures, ServerLoadReceipt, ServerTrace, Spread

if TYPE_CHECKING:
    from omnifp4.benchmark.server.load import Outcome


def spread(values: Iterable[float | None]) -> Spread:
    """Mean, nearest-rank percentiles and extremes of the values that are there."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return Spread(count=0)

    def rank(percent: int) -> float:
        return found[max(0, ceil(percent * len(found) / 100) - 1)]

    return Spread(
        count=len(found),
        mean=sum(found) / len(found),
        p50=rank(50),
        p90=rank(90),
        p99=rank(99),
        least=found[0],
        most=found[-1],
    )


def kind_figures(name: str, outcomes: Sequence[Outcome]) -> KindFigures:
    """Of the requests of one kind, or of all; times are those of good answers."""
    good = [outcome.answer for outcome in outcomes if not outcome.answer.error]
    return KindFigures(
        kind=name,
        requests=len(outcomes),
        failed=len(outcomes) - len(good),
        tokens=sum(answer.tokens for answer in good),
        ttft_s=spread(answer.ttft_s for answer in good),
        tpot_s=spread(answer.tpot_s for answer in good),
        end_to_end_s=spread(answer.end_s - answer.sent_s for answer in good),
        speech_rtf=spread(answer.speech_rtf for answer in good),
        first_sound_s=spread(
            answer.first_sound_s - answer.sent_s if answer.first_sound_s is not None else None for answer in good
        ),
    )


def error_name(error: str) -> str:
    """An error without what differs from request to request, so that like ones are counted together."""
    return re.sub(r"0x[0-9a-f]+|[0-9a-f]{8,}|\d{4,}", "…", error)[:160]


def load_receipt(
    url: str, engine: str, model: str, options: TraceOptions, outcomes: Sequence[Outcome]
) -> ServerLoadReceipt:
    """The record of a run; `outcomes` has at least one."""
    answers = [outcome.answer for outcome in outcomes]
    good = [answer for answer in answers if not answer.error]
    wall = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    per_second = 1.0 / wall if wall > 0 else 0.0
    tokens, sound = sum(answer.tokens for answer in good), sum(answer.sound_seconds for answer in good)
    kinds = [kind for kind in Kind if any(outcome.request.kind is kind for outcome in outcomes)]
    by_kind = {kind: [outcome for outcome in outcomes if outcome.request.kind is kind] for kind in kinds}
    return ServerLoadReceipt(
        server=url,
        engine=engine,
        model=model,
        trace=ServerTrace(
            requests=options.requests,
            rate_per_s=options.rate_per_s,
            arrivals=options.arrivals.value,
            concurrency=options.concurrency,
            mix={kind.value: len(members) for kind, members in by_kind.items()},
            max_tokens=options.max_tokens,
            prompt_words=options.prompt_words,
            seed=options.seed,
            warmup=options.warmup,
        ),
        streamed=bool(good) and all(answer.streamed for answer in good),
        tokens_counted="usage" if good and all(answer.tokens_counted == "usage" for answer in good) else "pieces",
        wall_s=wall,
        waited_s=spread(outcome.waited_s for outcome in outcomes if options.rate_per_s is not None),
        all_kinds=kind_figures("all", outcomes),
        kinds=tuple(kind_figures(kind.value, members) for kind, members in by_kind.items()),
        output_tokens=tokens,
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        audio_seconds=sound,
        requests_per_s=len(good) * per_second,
        output_tokens_per_s=tokens * per_second,
        audio_seconds_per_s=sound * per_second,
        errors=dict(Counter(error_name(answer.error) for answer in answers if answer.error).most_common()),
        environment=this_environment(),
    )
