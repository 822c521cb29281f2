"""Who is next: requests take places in the engine and advance together, one token each, as others come and go.

One thread makes tokens: it admits, steps and ends. A second turns them into text while the next step runs, so that a GPU
never waits for a tokenizer; a stop string is therefore found a step late, and the token after it is thrown away. A third
speaks, one answer at a time, because a talker's cache and graph exist once. None touches a socket: what they make goes
to the event loop in one call a step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from contextlib import closing
from typing import Any, Final

from omnifp4.chat.answer import SAMPLING_RATE, SpeechPiece, TextPiece
from omnifp4.chat.speech import speak
from omnifp4.decoding.engine import DecodingError, Engine, EngineFull
from omnifp4.serve.errors import as_api_error, going_down, internal_error, overloaded, too_late
from omnifp4.serve.job import Ended, Failed, Job, JobEvent, TextDone, deliver
from omnifp4.serve.metrics import Metrics

log = logging.getLogger("omnifp4.serve")

ADMISSIONS: Final = 4
"""Prompts read between two steps: more would hold up the texts under way, fewer those that wait."""

FULL_SECONDS: Final = 0.01
"""Pause before an engine that is full without any text of ours is asked again."""


class Scheduler:
    """Runs jobs on one model.

    Attributes:
        most_sequences: texts at once.
        most_jobs: requests at once, waiting ones included.
    """

    def __init__(self, model: Any, engine: Engine, *, most_sequences: int, waiting: int, metrics: Metrics) -> None:
        """Starts the threads. The engine is the scheduler's alone from now on; `waiting` requests may wait beside `most_sequences` that have a place."""
        self.most_sequences = min(most_sequences, engine.most_sequences)
        self.most_jobs = self.most_sequences + waiting
        self._model = model
        self._engine = engine
        self._metrics = metrics
        self._wake = threading.Condition()
        self._reserved = 0
        self._arrived: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._to_say: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"omnifp4-{name}", daemon=True)
            for name, work in (("tokens", self._make_tokens), ("text", self._write), ("say", self._say))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still worked on."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    @property
    def running(self) -> int:
        """Texts under way."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests that are under way in some other state: prepared, waiting, or spoken."""
        return max(0, self._reserved - len(self._active))

    def reserve(self) -> None:
        """Counts a request in, before anything is spent on it; `release` counts it out.

        Raises:
            ApiError: 503, there are too many.
        """
        with self._wake:
            if self._reserved >= self.most_jobs:
                raise overloaded(f"{self._reserved} requests are under way or waiting, the most that this server takes")
            self._reserved += 1

    def release(self) -> None:
        with self._wake:
            self._reserved -= 1

    def submit(self, job: Job) -> None:
        """Queues a job; its events come until `Ended` or `Failed`, or until it is cancelled."""
        with self._wake:
            if self._closing:
                raise going_down()
            if not self.alive:
                raise internal_error()
            self._arrived.append(job)
            self._wake.notify()

    def give_up(self) -> None:
        """Ends all jobs, whose listeners are told; returns at once."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self) -> None:
        """As `give_up`, and ends the threads."""
        self.give_up()
        self._to_write.put(None)
        self._to_say.put(None)
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except BaseException:
            log.exception("a thread of the server ended; restart the server")
            # Nobody else would ever tell those who wait.
            left = [*self._active, *self._waiting, *self._arrived]
            deliver([(job, Failed(internal_error())) for job in left])
            raise

    # Tokens

    def _make_tokens(self) -> None:
        while self._wait_for_work():
            self._drop()
            self._admit()
            self._step()
            self._metrics.running.set(len(self._active))
            self._metrics.waiting.set(len(self._waiting))
        for job in [*self._active, *self._waiting]:
            self._fail(job, going_down())

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._closing or self._arrived or self._active):
                # What waits here found the engine full of somebody else's texts.
                self._wake.wait(FULL_SECONDS if self._waiting else None)
                if self._waiting:
                    break
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            return not self._closing

    def _drop(self) -> None:
        """Takes out what nobody waits for, what took too long, and what the writer has ended at a stop string."""
        for job in [job for job in self._active if job.cancelled or job.late or job.run.finish_reason is not None]:
            self._active.remove(job)
            if job.run.finish_reason is None:
                self._give_up(job)
        if any(job.cancelled or job.late for job in self._waiting):
            for job in self._waiting:
                if job.cancelled or job.late:
                    self._give_up(job)
            self._waiting = deque(job for job in self._waiting if not (job.cancelled or job.late))

    def _give_up(self, job: Job) -> None:
        job.ending = "cancelled" if job.cancelled else "timeout"
        if job.run.sequence is not None:
            self._engine.stop(job.run.sequence)
        self._metrics.finished.labels(job.ending).inc()
        if not job.cancelled:
            deliver([(job, Failed(too_late(job.deadline - job.began)))])

    def _admit(self) -> None:
        admitted = 0
        while self._waiting and len(self._active) < self.most_sequences and admitted < ADMISSIONS:
            job = self._waiting[0]
            try:
                job.run.open()
            except EngineFull:
                return
            except Exception as error:
                self._waiting.popleft()
                self._fail(job, error)
                continue
            self._waiting.popleft()
            self._metrics.prompt_tokens.inc(job.prompt_tokens)
            self._metrics.first_token.observe(time.monotonic() - job.began)
            self._metrics.new_tokens.inc()
            self._active.append(job)
            self._end_or_keep([job])
            # The first token takes the short way; the writer has nothing of this job yet.
            self._write_all([job])
            admitted += 1

    def _step(self) -> None:
        if not self._active:
            return
        began = time.perf_counter()
        stepped = list(self._active)
        before = [_made(job) for job in stepped]
        try:
            # All that is under way, and nobody else's: one that ends at a stop string in this moment is left out.
            self._engine.step()
        except Exception as error:
            log.warning("a step of %d texts failed, each goes on alone: %s", len(stepped), error)
            self._step_alone(stepped, before)
        self._end_or_keep(stepped)
        self._to_write.put(stepped)
        self._metrics.step.observe(time.perf_counter() - began)
        self._metrics.new_tokens.inc(sum(map(_made, stepped)) - sum(before))

    def _end_or_keep(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job in self._active and job.run.is_at_end:
                self._active.remove(job)
                # Its place is free for the next one before its last word is written.
                if job.run.sequence is not None:
                    self._engine.stop(job.run.sequence)

    def _step_alone(self, jobs: list[Job], before: list[int]) -> None:
        """One bad text must not end the others: each is stepped by itself, and those that fail are ended."""
        for job, made in zip(jobs, before, strict=True):
            if job.run.finish_reason is not None or job.run.sequence is None or _made(job) > made:
                continue  # it is over, or has its token of this step
            try:
                self._engine.step([job.run.sequence])
            except Exception as error:
                if job.run.finish_reason is None:
                    self._active.remove(job)
                    self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        job.ending = "failed"
        if job.run.sequence is not None:
            self._engine.stop(job.run.sequence)
        self._metrics.finished.labels("failed").inc()
        deliver([(job, Failed(told(error)))])

    # Text

    def _write(self) -> None:
        while (jobs := self._to_write.get()) is not None:
            self._write_all(jobs)

    def _write_all(self, jobs: list[Job]) -> None:
        posts: list[tuple[Job, JobEvent]] = []
        for job in jobs:
            if not job.ending:
                self._write_one(job, posts)
        deliver(posts)

    def _write_one(self, job: Job, posts: list[tuple[Job, JobEvent]]) -> None:
        try:
            piece = job.run.collect()
        except Exception as error:
            job.cancel()
            posts.append((job, Failed(told(error))))
            job.ending = "failed"
            return
        if piece:
            posts.append((job, TextPiece(piece)))
        reason = job.run.finish_reason
        if reason is None:
            return
        job.ending = reason
        posts.append((job, TextDone(reason, len(job.run.tokens))))
        if job.script is None:
            self._metrics.finished.labels(reason).inc()
            posts.append((job, Ended()))
        else:
            self._metrics.speaking.inc()
            self._to_say.put(job)

    # Speech

    def _say(self) -> None:
        while (job := self._to_say.get()) is not None:
            reason = "cancelled"
            try:
                if not job.cancelled:
                    reason = self._say_one(job)
            except Exception as error:
                reason = "failed"
                deliver([(job, Failed(told(error)))])
            finally:
                self._metrics.speaking.dec()
                self._metrics.finished.labels(reason).inc()

    def _say_one(self, job: Job) -> str:
        assert job.script is not None
        if self._closing:
            raise going_down()
        if job.late:
            raise too_late(job.deadline - job.began)
        with closing(speak(self._model, job.script(), job.options, chunks=True)) as pieces:
            for waveform in pieces:
                if job.cancelled:
                    return "cancelled"
                if self._closing:
                    raise going_down()
                if job.late:
                    raise too_late(job.deadline - job.began)
                self._metrics.speech_seconds.inc(len(waveform) / SAMPLING_RATE)
                deliver([(job, SpeechPiece(waveform))])
        deliver([(job, Ended())])
        return str(job.run.finish_reason)


def told(error: Exception) -> Any:
    """What the client hears of an error; what it may not hear is logged."""
    known = as_api_error(error)
    if isinstance(error, DecodingError) and not isinstance(error, EngineFull):
        log.error("%s", error)
    if known is None:
        log.error("an answer failed", exc_info=error)
        return internal_error()
    return known


def _made(job: Job) -> int:
    """Tokens that the engine has made for it."""
    return 0 if job.run.sequence is None else len(job.run.sequence.tokens)
