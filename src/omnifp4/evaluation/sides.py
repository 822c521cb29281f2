"""One checkpoint as the source of logits: loaded whole, or layer by layer from disk. Both give the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.segments import run_segments
from omnifp4.segments.inputs import thinker_arguments
from omnifp4.segments.run import HEAD_POSITIONS

ATTENTION: Final = "sdpa"
OTHER_ATTENTION: Final = "eager"
"""Of the noise floor: the same numbers in another order of rounding."""

OnLogits = Callable[[int, Tensor], None]
"""Takes the number of a request, and its logits ``[positions, vocabulary]``."""

Request = tuple[EncodedSample, str]
"""A sample, and the attention to run it with."""

Progress = Callable[[int, int, str], None]


class WholeSide:
    """A loaded model."""

    def __init__(self, model: Any) -> None:
        """`model` comes from `omnifp4.load`."""
        self.model = model

    def run(self, requests: Sequence[Request], on_logits: OnLogits) -> None:
        """Give the logits of each request, in order."""
        thinker = self.model.thinker
        text = thinker.get_decoder()
        device = thinker.get_input_embeddings().weight.device
        before = text.config._attn_implementation
        states: list[Tensor] = []
        hook = text.norm.register_forward_hook(lambda _, __, output: states.append(output))
        try:
            with torch.no_grad():
                for number, (sample, attention) in enumerate(requests):
                    text.config._attn_implementation = attention
                    states.clear()
                    with _short_head(thinker.lm_head):
                        thinker(**thinker_arguments(thinker, sample, device))
                    scored = states[-1][0][sample.positions.to(device)]
                    logits = [
                        thinker.lm_head(scored[first : first + HEAD_POSITIONS])
                        for first in range(0, len(scored), HEAD_POSITIONS)
                    ]
                    on_logits(number, torch.cat(logits))
        finally:
            text.config._attn_implementation = before
            hook.remove()


@contextmanager
def _short_head(head: Any) -> Iterator[None]:
    """Of a long prompt the head would make a gigabyte of logits that nobody reads; inside, it makes the last."""
    hook = head.register_forward_pre_hook(lambda _, values: (values[0][:, -1:],))
    try:
        yield
    finally:
        hook.remove()


class SegmentedSide:
    """A checkpoint that stays on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None,
        work: Path | None = None,
    ) -> None:
        """`work` is a folder in which a killed run goes on, see `run_segments`."""
        self._checkpoint, self._device, self._dtype, self._progress, self._work = (
            checkpoint, device, dtype, progress, work,
        )  # fmt: skip

    def run(self, requests: Sequence[Request], on_logits: OnLogits) -> None:
        """Give the logits of each request, in order, after all of them passed all layers."""
        waiting: list[Tensor] = []

        def collect(number: int, first: int, logits: Tensor) -> None:
            waiting.append(logits)
            if first + len(logits) == len(requests[number][0].positions):
                on_logits(number, torch.cat(waiting))
                waiting.clear()

        run_segments(
            self._checkpoint,
            [sample for sample, _ in requests],
            device=self._device,
            dtype=self._dtype,
            attention=[attention for _, attention in requests],
            positions=[sample.positions for sample, _ in requests],
            on_logits=collect,
            work=self._work,
            progress=self._progress,
        )
        if self._work is not None:
            # All that was to be continued is done.
            shutil.rmtree(self._work)


Side = WholeSide | SegmentedSide
