"""One frame of speech as one CUDA graph: some thousand small kernels, launched by a single call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP_RUNS = 2
"""Libraries choose kernels and take their workspaces in the first runs, which must not happen under capture."""


class CapturedRun:
    """A function that reads and writes only tensors with fixed addresses, captured."""

    def __init__(self, run: Callable[[], None], generator: torch.Generator) -> None:
        """Runs it a few times, which changes the tensors, and captures it.

        Args:
            run: waits for nothing and allocates nothing that outlives it.
            generator: whose numbers it draws; each replay draws on.
        """
        device = generator.device
        with torch.cuda.device(device), torch.no_grad():
            # Its kernels are tiny and somebody waits for them; those of a chunk that is decoded meanwhile are not.
            stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    run()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            # Other threads may use the device meanwhile, such as the one that decodes another speech.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        self._graph: Any = graph

    def __call__(self) -> None:
        """Replays it on the current stream."""
        self._graph.replay()
