"""The record of a load test of an OpenAI-compatible server: what was sent, how long it took, what went wrong."""

from __future__ import annotations

from typing import Final

from omnifp4.receipt.base import Environment, Record

SERVER_LOAD_VERSION: Final = 1
"""Raised when a field of this record changes its meaning or goes away."""


class Spread(Record):
    """How a quantity is spread over the requests that have it.

    Attributes:
        count: of values; with 0 all others are None.
        p50: nearest-rank percentiles, as are the others.
    """

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    least: float | None = None
    most: float | None = None


class ServerTrace(Record):
    """What was sent, and when.

    Attributes:
        rate_per_s: requests a second that were aimed at; None: as fast as `concurrency` allows.
        arrivals: constant, poisson or burst.
        concurrency: most requests under way at once.
        mix: requests by kind.
        max_tokens: asked for in each request.
    """

    requests: int
    rate_per_s: float | None
    arrivals: str
    concurrency: int
    mix: dict[str, int]
    max_tokens: int
    prompt_words: int
    seed: int
    warmup: int


class KindFigures(Record):
    """Requests of one kind: text, image, audio, video or speech.

    Attributes:
        ttft_s: seconds from sending to the first token.
        tpot_s: seconds a token after the first.
        end_to_end_s: seconds from sending to the end of the answer.
        speech_rtf: seconds from sending to the last sound, over the seconds of that sound; below 1 is faster than real time.
        first_sound_s: seconds from sending to the first sound.
    """

    kind: str
    requests: int
    failed: int
    tokens: int
    ttft_s: Spread
    tpot_s: Spread
    end_to_end_s: Spread
    speech_rtf: Spread
    first_sound_s: Spread


class ServerLoadReceipt(Record):
    """The record of ``omnifp4 bench --server``.

    Attributes:
        server: its URL, without a user name or password.
        engine: what the server says it is, such as ``vllm 0.26.0``; empty if it does not say.
        model: as the server calls it.
        streamed: whether token times were seen one by one.
        tokens_counted: ``usage`` (the server's own count), or ``pieces`` where a server gives none: one a piece of text.
        wall_s: from the first request sent to the end of the last.
        waited_s: seconds that requests waited beyond their arrival, because `concurrency` requests were under way.
        output_tokens_per_s: tokens of all good answers over `wall_s`.
        audio_seconds_per_s: seconds of sound over `wall_s`.
        errors: failed requests by what went wrong.
    """

    receipt: str = "server-load"
    version: int = SERVER_LOAD_VERSION
    server: str
    engine: str
    model: str
    trace: ServerTrace
    streamed: bool
    tokens_counted: str
    wall_s: float
    waited_s: Spread
    all_kinds: KindFigures
    kinds: tuple[KindFigures, ...]
    output_tokens: int
    prompt_tokens: int
    audio_seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    audio_seconds_per_s: float
    errors: dict[str, int]
    environment: Environment
