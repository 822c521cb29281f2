"""One small request in each modality that an engine serves: does it answer, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from omnifp4.benchmark.server.client import Answer, Server, ask
from omnifp4.benchmark.server.trace import Kind, TraceOptions, request_body
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.handover import SmokeResult

TOKENS: Final = 64
WORDS: Final = 12
TEXT_SHOWN: Final = 60


def send_smoke(
    server: Server, model: str, modalities: Sequence[str], seed: int, say: Callable[[str], None]
) -> tuple[SmokeResult, ...]:
    """Send a request in each of `modalities`, one after another; text goes twice, and the second is timed.

    The first compiles and fills caches, which is no speed of the engine.
    """
    options = TraceOptions(max_tokens=TOKENS, prompt_words=WORDS, seed=seed)
    results = []
    for name in modalities:
        kind = Kind(name)
        say(f"smoke request: {name}")
        rounds = 2 if kind is Kind.TEXT else 1
        answers = [ask(server, {"model": model, **request_body(kind, options, n + 1)}) for n in range(rounds)]
        failed = next((answer for answer in answers if answer.error), None)
        results.append(_judge(kind, failed or answers[-1]))
    return tuple(results)


def _judge(kind: Kind, answer: Answer) -> SmokeResult:
    error = answer.error
    if not error and kind is Kind.SPEECH and not answer.sound_bytes:
        error = "text came back, but no sound"
    detail = error or _heard(answer)
    tpot = answer.tpot_s
    return SmokeResult(
        kind=kind.value,
        verdict=Verdict.FAIL if error else Verdict.PASS,
        detail=detail,
        seconds=answer.end_s - answer.sent_s,
        first_token_s=answer.ttft_s,
        tokens=answer.tokens,
        tokens_per_s=1.0 / tpot if tpot else None,
        speech_rtf=answer.speech_rtf,
    )


def _heard(answer: Answer) -> str:
    text = " ".join(answer.text.split())
    shown = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " …"
    sound = f", {answer.sound_seconds:.1f} s of sound" if answer.sound_bytes else ""
    return f"{answer.tokens} tokens{sound}: {shown!r}" if shown else f"{answer.tokens} tokens{sound}, no readable text"
