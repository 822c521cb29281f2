"""Times, tokens and memory of one answer."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from omnifp4.chat.answer import SAMPLING_RATE, Answer, Stats, Waveform
from omnifp4.chat.errors import ContextError
from omnifp4.chat.generation import TextRun
from omnifp4.chat.inputs import ModelInputs


class Meter:
    """Counts from the moment of the question to the answer."""

    def __init__(self, device: Any, began: float) -> None:
        """`began` is ``time.perf_counter()`` at the question."""
        self._device = device
        self._began = began
        self._speech_began: float | None = None
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def speech_begins(self) -> None:
        self._speech_began = time.perf_counter()

    def peak(self) -> tuple[int, Literal["cuda", "process"]]:
        """Bytes, and of what."""
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device)), "cuda"
        return peak_process_bytes(), "process"

    @contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """Tells a person what to do when the device is full.

        Raises:
            ContextError: in place of PyTorch's error.
        """
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            reason = str(error).partition(". ")[0]
            raise ContextError(
                f"the answer does not fit into memory: {reason}",
                hint="reset, shorten the conversation, or set context_tokens lower",
            ) from error

    def answer(
        self,
        inputs: ModelInputs | None,
        run: TextRun | None,
        waveform: Waveform | None,
        notes: tuple[str, ...],
        *,
        cut: bool = False,
    ) -> Answer:
        """The answer with its figures; without a run it was interrupted before the model began, `cut` says later."""
        taken = time.perf_counter() - self._speech_began if self._speech_began is not None else 0.0
        peak, where = self.peak()
        tokens = tuple(run.tokens) if run is not None else ()
        span = run.last_token_at - run.first_token_at if run is not None else 0.0
        stats = Stats(
            prompt_tokens=inputs.prompt_tokens if inputs is not None else 0,
            new_tokens=len(tokens),
            seconds_to_first_token=run.first_token_at - self._began if run is not None and tokens else 0.0,
            tokens_per_second=(len(tokens) - 1) / span if span > 0 else 0.0,
            peak_bytes=peak,
            peak_where=where,
            speech_seconds=len(waveform) / SAMPLING_RATE if waveform is not None else 0.0,
            speech_seconds_taken=taken,
            turns_left_out=inputs.turns_left_out if inputs is not None else 0,
            notes=notes,
        )
        reason = "interrupted" if cut or run is None else run.finish_reason
        return Answer(run.text if run is not None else "", waveform, tokens, reason or "interrupted", stats)


def process_bytes() -> int:
    """Bytes of memory that this process holds now; where the system does not tell, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_process_bytes()


def peak_process_bytes() -> int:
    """The most bytes of memory that this process has held."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
