"""Counts and times for Prometheus."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS: Final = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "omnifp4_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.finished = Counter("omnifp4_answers", "Answers by how they ended", ["reason"], registry=registry)
        self.prompt_tokens = Counter("omnifp4_prompt_tokens", "Tokens read", registry=registry)
        self.new_tokens = Counter("omnifp4_generated_tokens", "Tokens of text made", registry=registry)
        self.speech_seconds = Counter("omnifp4_speech_seconds", "Seconds of speech made", registry=registry)
        self.running = Gauge("omnifp4_answers_running", "Answers whose text is being made", registry=registry)
        self.waiting = Gauge("omnifp4_answers_waiting", "Answers that wait for a place", registry=registry)
        self.speaking = Gauge("omnifp4_answers_speaking", "Answers being spoken or waiting for it", registry=registry)
        self.first_token = Histogram(
            "omnifp4_time_to_first_token_seconds",
            "From the complete request to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.step = Histogram(
            "omnifp4_step_seconds", "One token for every answer under way", buckets=_STEP_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
