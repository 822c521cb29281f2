"""Makes the codes of speech, frame by frame, faster than they are heard.

Transformers' ``generate()`` runs the code predictor's own ``generate()`` inside each step of the talker's: sixteen
loops a frame, thousands of launches, each waiting for the host. `SpeechEngine` runs the same frame as one function,
on CUDA as one graph. It keeps its memory and its graph for the next speech of the same model.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from omnifp4.decoding.speech_choice import tensors_of
from omnifp4.decoding.speech_fixed import FixedSteps
from omnifp4.decoding.speech_frame import SpeechFrame
from omnifp4.decoding.speech_graph import CapturedRun
from omnifp4.decoding.speech_sampling import CodeSampling
from omnifp4.decoding.speech_steps import ModuleSteps, read_prompt
from omnifp4.decoding.talker_opening import Opening
from omnifp4.errors import OmniFP4Error

LEAST_CAPACITY = 1024
"""Tokens of prompt and frames; beyond it memory is taken in powers of two."""


class SpeechEngine:
    """Speech of one talker, one at a time."""

    def __init__(self, talker: Any, name: str) -> None:
        """`name`: of `ENGINES`, ``cuda-graph``, ``fixed`` or ``modules``."""
        # Engines are kept for as long as their talker lives, so they must not keep it alive.
        self._talker = weakref.ref(talker)
        self.name = name
        self._frame: SpeechFrame | None = None
        self._graph: CapturedRun | None = None
        self._made_for: tuple[Any, ...] = ()

    def frames(
        self, opening: Opening, sampling: CodeSampling, *, seed: int, most_frames: int
    ) -> Generator[Tensor, None, None]:
        """Makes a speech.

        The caller keeps others off the engine until the iterator is closed or at its end. Work ends between frames.

        Args:
            opening: the talker's input.
            sampling: of the talker's codes.
            seed: the same gives the same codes.
            most_frames: of 80 ms.

        Yields:
            The codes of a frame, int64 ``[groups]``, in host memory.

        Raises:
            OmniFP4Error: the weights are damaged.
        """
        talker = self._talker()
        assert talker is not None, "who holds an engine holds its talker"
        tokens = opening.prompt_tokens
        with _on(talker.device):
            frame = self._prepare(talker, sampling, tokens, most_frames)
            logits, hidden, cache, shift = read_prompt(talker, opening.inputs)
            if not bool(torch.isfinite(logits.max())):
                raise _damaged(0)
            with torch.no_grad():
                frame.steps.begin(talker, cache, shift, tokens)
                frame.begin(opening, sampling, logits, hidden, seed)
            if frame.first_code() == opening.eos:
                return
            rows = _Rows(frame, talker.device)
        # A GPU begins the next frame before the last one is looked at; after the last that is done in vain.
        ahead = 1 if talker.device.type == "cuda" else 0
        started = 0
        for made in range(most_frames):
            with _on(talker.device), torch.no_grad():
                while started < min(most_frames, made + 1 + ahead):
                    self._run(talker, frame)
                    rows.send(started)
                    started += 1
                row = rows.receive(made)
            if not int(row[-1]):
                raise _damaged(made)
            yield row[:-2]
            if int(row[-2]) == opening.eos:
                return

    def _run(self, talker: Any, frame: SpeechFrame) -> None:
        if self._graph is not None:
            self._graph()
        else:
            frame.run(talker)

    def _prepare(self, talker: Any, sampling: CodeSampling, tokens: int, frames: int) -> SpeechFrame:
        """Memory for the speech, and the graph on it; what there is stays if it suffices."""
        capacity = LEAST_CAPACITY
        while capacity < tokens + frames:
            capacity *= 2
        if self._frame is not None and self._made_for:
            capacity = max(capacity, self._frame.most_frames)
        # Temperature and penalty are read anew by every speech.
        shape = replace(sampling, temperature=1.0, repetition_penalty=1.0)
        # A model that was moved or cast has its weights elsewhere, where no graph would look for them.
        places = tuple(tensor.data_ptr() for tensor in tensors_of(talker))
        made_for = (capacity, shape, places)
        if self._frame is None or made_for != self._made_for:
            self._graph = self._frame = None
            steps = ModuleSteps() if self.name == "modules" else FixedSteps(talker, capacity)
            frame = SpeechFrame(talker, steps, shape, capacity)
            if self.name == "cuda-graph":
                self._graph = CapturedRun(lambda: frame.run(talker), frame.generator)
            self._frame = frame
            self._made_for = made_for
        return self._frame


class _Rows:
    """Results on their way from the device; two may be under way."""

    def __init__(self, frame: SpeechFrame, device: torch.device) -> None:
        self._frame = frame
        self._asynchronous = device.type == "cuda"
        self._slots = [torch.empty_like(frame.row, device="cpu", pin_memory=self._asynchronous) for _ in range(2)]
        self._arrived = [_event() for _ in range(2)] if self._asynchronous else []

    def send(self, number: int) -> None:
        self._slots[number % 2].copy_(self._frame.row, non_blocking=True)
        if self._asynchronous:
            self._arrived[number % 2].record()

    def receive(self, number: int) -> Tensor:
        """A copy: the slot is used again."""
        if self._asynchronous:
            self._arrived[number % 2].synchronize()
        return self._slots[number % 2].clone()


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _damaged(frames: int) -> OmniFP4Error:
    return OmniFP4Error(
        f"the talker's output is not finite after {frames} frames: its weights are damaged", hint="omnifp4 verify MODEL"
    )


_engines: WeakKeyDictionary[Any, dict[str, SpeechEngine]] = WeakKeyDictionary()


def engine_for(talker: Any, name: str) -> SpeechEngine:
    """The engine of a talker, the same at each call; one speech at a time, which the caller sees to."""
    engines = _engines.setdefault(talker, {})
    if name not in engines:
        engines[name] = SpeechEngine(talker, name)
    return engines[name]
