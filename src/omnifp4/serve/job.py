"""One request under way, and what the model's threads tell of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from omnifp4.chat.answer import FinishReason, SpeechPiece, TextPiece
from omnifp4.chat.generation import Options, TextRun
from omnifp4.chat.speech import Script
from omnifp4.serve.errors import ApiError


@dataclass(frozen=True, slots=True)
class TextDone:
    """All text is there; speech may follow.

    Attributes:
        finish_reason: why it ended.
        new_tokens: that were made, the end marker included.
    """

    finish_reason: FinishReason
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing follows."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing follows, and this is why."""

    error: ApiError


JobEvent = TextPiece | TextDone | SpeechPiece | Ended | Failed


class Mailbox:
    """A job's events on the event loop, for one listener who also wants to be woken for other reasons.

    One future a wait, where a queue beside other conditions takes a task for each: that is what a token costs.
    """

    def __init__(self) -> None:
        self.events: deque[JobEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: JobEvent) -> None:
        """Adds an event; on the event loop."""
        self.events.append(event)
        self.wake()

    def wake(self) -> None:
        """Ends `wait`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Until there is an event, `wake` is called, or so much time has passed."""
        if self.events:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(seconds, self.wake)
        try:
            await self._waiter
        finally:
            timer.cancel()


@dataclass(eq=False)
class Job:
    """One answer, from the prepared prompt to the last sample.

    Attributes:
        run: its text.
        options: for its speech.
        script: what is to be said when the text is done; None: nothing.
        prompt_tokens: that the model reads.
        began: when the request was complete, ``time.monotonic()``.
        deadline: after which it is given up.
        ending: how its text ended; empty while it is under way.
    """

    run: TextRun
    options: Options
    script: Callable[[], Script] | None
    prompt_tokens: int
    began: float
    deadline: float
    ending: str = ""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, repr=False)
    mail: Mailbox = field(default_factory=lambda: Mailbox(), repr=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    def cancel(self) -> None:
        """Nobody listens any more; it ends at the next token or piece of speech."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


def deliver(posts: list[tuple[Job, JobEvent]]) -> None:
    """Hands events to their listeners, from any thread; one call for many saves waking the loop for each."""
    for loop in {job.loop for job, _ in posts}:
        own = [(job, event) for job, event in posts if job.loop is loop]
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put, own)


def _put(posts: list[tuple[Job, JobEvent]]) -> None:
    for job, event in posts:
        job.mail.put(event)
