"""A trace: which requests are sent to a server, and when. The same options give the same trace."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from omnifp4.benchmark.server.samples import picture_sample, sound_sample, text_sample, video_sample
from omnifp4.errors import OmniFP4Error

BURST_SIZE: Final = 8
"""Requests that arrive together in the `burst` process."""


class Kind(StrEnum):
    """What a request holds, and what it asks for."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    SPEECH = "speech"
    """Text in, text and sound out."""


class Arrivals(StrEnum):
    """How requests arrive."""

    CONSTANT = "constant"
    POISSON = "poisson"
    BURST = "burst"
    """In groups of `BURST_SIZE` that arrive as a Poisson process."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What to send.

    Attributes:
        requests: in all, without the warm-up.
        rate_per_s: mean arrivals a second; None: all at once, so that `concurrency` are always under way.
        concurrency: most requests under way at once; a later one waits, which is recorded.
        mix: weight of each kind; the counts follow it as closely as whole numbers allow.
        max_tokens: of each answer.
        prompt_words: words of text in each request.
        ignore_eos: ask for exactly `max_tokens` tokens (vLLM's extension, and ours).
        files: files to send instead of made samples, by kind.
        voice: of spoken answers.
        warmup: requests of each kind sent before, one after another, and not counted.
    """

    requests: int = 32
    rate_per_s: float | None = None
    arrivals: Arrivals = Arrivals.POISSON
    concurrency: int = 8
    mix: Mapping[Kind, float] = field(default_factory=lambda: {Kind.TEXT: 1.0})
    max_tokens: int = 64
    prompt_words: int = 32
    seed: int = 0
    ignore_eos: bool = False
    files: Mapping[Kind, tuple[Path, ...]] = field(default_factory=dict)
    voice: str = "Ethan"
    warmup: int = 1

    def __post_init__(self) -> None:
        checks = (
            (self.requests >= 1, f"requests {self.requests} is less than 1"),
            (self.concurrency >= 1, f"concurrency {self.concurrency} is less than 1"),
            (self.rate_per_s is None or self.rate_per_s > 0, f"rate {self.rate_per_s} is not positive"),
            (self.max_tokens >= 1, f"max tokens {self.max_tokens} is less than 1"),
            (sum(self.mix.values()) > 0 and min(self.mix.values()) >= 0, "the mix has no positive weight"),
        )
        for good, problem in checks:
            if not good:
                raise OmniFP4Error(problem, hint="omnifp4 bench --help")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: when it arrives (seconds after the start), its kind, and the JSON to send but for the model's name."""

    number: int
    kind: Kind
    arrives_s: float
    body: Mapping[str, Any]


def parse_mix(text: str) -> dict[Kind, float]:
    """Reads ``text=4,image=1,speech=1``; a kind without a number weighs 1.

    Raises:
        OmniFP4Error: an unknown kind, or a weight that is no number of at least 0.
    """
    mix: dict[Kind, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = part.partition("=")
        try:
            kind, weight = Kind(name.strip()), float(number or 1)
        except ValueError:
            raise OmniFP4Error(
                f"mix {part[:40]!r} is not KIND=WEIGHT", hint=f"kinds: {', '.join(Kind)}; such as text=4,image=1"
            ) from None
        if not 0 <= weight < float("inf"):
            raise OmniFP4Error(f"mix {part[:40]!r}: the weight must be a number of at least 0")
        mix[kind] = mix.get(kind, 0.0) + weight
    if not sum(mix.values()):
        raise OmniFP4Error(f"mix {text[:40]!r} is empty", hint=f"kinds: {', '.join(Kind)}; such as text=4,image=1")
    return mix


def plan_trace(options: TraceOptions) -> tuple[PlannedRequest, ...]:
    """All requests in order of arrival.

    Raises:
        OmniFP4Error: a file cannot be read.
    """
    kinds = _kinds(options)
    times = _arrival_times(options)
    return tuple(
        PlannedRequest(number, kind, time, request_body(kind, options, number + 1))
        for number, (kind, time) in enumerate(zip(kinds, times, strict=True))
    )


def plan_warmup(options: TraceOptions) -> tuple[PlannedRequest, ...]:
    """The requests that are sent first and not counted."""
    kinds = [kind for kind, weight in options.mix.items() if weight > 0]
    return tuple(
        PlannedRequest(number, kind, 0.0, request_body(kind, options, -1 - number))
        for number, kind in enumerate(kinds * options.warmup)
    )


def _kinds(options: TraceOptions) -> list[Kind]:
    """Counts by the largest remainders, in a shuffled order."""
    total = sum(options.mix.values())
    shares = {kind: options.requests * weight / total for kind, weight in options.mix.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    left = options.requests - sum(counts.values())
    for kind in sorted(shares, key=lambda kind: counts[kind] - shares[kind])[:left]:
        counts[kind] += 1
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    random.Random(f"kinds {options.seed}").shuffle(kinds)
    return kinds


def _arrival_times(options: TraceOptions) -> list[float]:
    count, rate = options.requests, options.rate_per_s
    if rate is None:
        return [0.0] * count
    if options.arrivals is Arrivals.CONSTANT:
        return [number / rate for number in range(count)]
    draw = random.Random(f"arrivals {options.seed}")
    size = BURST_SIZE if options.arrivals is Arrivals.BURST else 1
    times: list[float] = []
    now = 0.0
    while len(times) < count:
        times += [now] * min(size, count - len(times))
        now += draw.expovariate(rate / size)
    return times


def request_body(kind: Kind, options: TraceOptions, number: int) -> dict[str, Any]:
    """The JSON of a ``/v1/chat/completions`` request, streamed, with usage at the end; the model's name is lacking."""
    seed = options.seed * 1_000_003 + number
    words = text_sample(options.prompt_words, seed)
    content: str | list[dict[str, Any]] = words
    if kind is not Kind.TEXT and kind is not Kind.SPEECH:
        content = [_media_part(kind, options, number, seed), {"type": "text", "text": words}]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": options.max_tokens,
        "temperature": 0.0,
        "seed": options.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "modalities": ["text", "audio"] if kind is Kind.SPEECH else ["text"],
    }
    if kind is Kind.SPEECH:
        body["audio"] = {"voice": options.voice, "format": "pcm16"}
    if options.ignore_eos:
        body["ignore_eos"] = True
    return body


def _media_part(kind: Kind, options: TraceOptions, number: int, seed: int) -> dict[str, Any]:
    files = options.files.get(kind, ())
    file = files[number % len(files)] if files else None
    try:
        data = file.read_bytes() if file is not None else None
    except OSError as error:
        raise OmniFP4Error(f"{file}: {error.strerror or error}") from error
    suffix = file.suffix.lstrip(".").lower() if file is not None else ""
    if kind is Kind.AUDIO:
        coded = base64.b64encode(data or sound_sample(seed)).decode()
        return {"type": "input_audio", "input_audio": {"data": coded, "format": suffix or "wav"}}
    if kind is Kind.IMAGE:
        mime = {"jpg": "jpeg"}.get(suffix, suffix or "png")
        coded = base64.b64encode(data or picture_sample(seed)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/{mime};base64,{coded}"}}
    coded = base64.b64encode(data or video_sample(seed)).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/{suffix or 'avi'};base64,{coded}"}}
