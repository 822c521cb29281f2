"""A training step as one CUDA graph: a small model's step is hundreds of launches, which cost more than its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOT_CAPTURED = 75
"""Exit status of a stage whose step could not be recorded: it is run again step by step."""
WARM_UP = 3
"""Steps before the recording, on a stream of their own, as CUDA graphs ask for."""
TRIALS = 4
"""Algorithms that cuDNN tries of each convolution."""
AHEAD = 2
"""Replays that may wait on the device; without a limit the clock would run ahead of them."""


def variation(device: Any, seed: int) -> torch.Generator:
    """The device's default generator, seeded: the one whose state a CUDA graph carries on from replay to replay."""
    device = torch.device(device)
    generators = torch.cuda.default_generators if device.type == "cuda" else (torch.default_generator,)
    generator: torch.Generator = generators[device.index or 0]
    generator.manual_seed(seed)
    return generator


def rate_of(device: Any, rate: float) -> Any:
    """A learning rate for an optimizer that is captured: on a GPU a tensor, which a replay reads."""
    return torch.tensor(rate, device=device) if torch.device(device).type == "cuda" else rate


class Step:
    """A training step on batches that all have the same shapes.

    Args:
        step: from tensors on the device to values for the log; computes losses and gradients and updates weights.
            It must not wait for the device.
        device: where it runs.
        capture: record it as a CUDA graph; otherwise it runs as it stands.

    Raises:
        SystemExit: with status `NOT_CAPTURED`, when the step cannot be recorded.
    """

    def __init__(self, step: Callable[[dict[str, Tensor]], dict[str, Tensor]], device: Any, capture: bool) -> None:
        self.step, self.device = step, torch.device(device)
        self.capture = capture and self.device.type == "cuda"
        self.graph: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.events: list[Any] = []

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step.

        Args:
            batch: on the CPU or the device; shapes and types as in the first call.

        Returns:
            The step's values; the next call overwrites them.
        """
        if not self.capture:
            return self.step({name: value.to(self.device) for name, value in batch.items()})
        if self.graph is None:
            self._record(batch)
        for name, value in batch.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > AHEAD:
            self.events.pop(0).synchronize()
        return self.values

    def _record(self, batch: dict[str, Tensor]) -> None:
        self.inputs = {name: value.to(self.device, copy=True) for name, value in batch.items()}
        # All shapes stay: cuDNN may try which of its convolutions are fastest here, but not for half a minute.
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = TRIALS
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.step(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.values = {name: value.detach() for name, value in self.step(self.inputs).items()}
        except RuntimeError as error:
            print(f"the step could not be recorded as a CUDA graph: {str(error).splitlines()[0]}", flush=True)
            raise SystemExit(NOT_CAPTURED) from error
        torch.backends.cudnn.benchmark = False
        self.graph = graph
