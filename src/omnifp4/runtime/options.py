"""What `omnifp4.load` wants of the load that Transformers is about to do; a plain ``from_pretrained`` has the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.runtime.progress import LoadProgress


@dataclass(frozen=True)
class LoadOptions:
    """Options of one load.

    Attributes:
        backend: name as `choose_backend` takes it.
        device: where packed weights go; None leaves it to Transformers' ``device_map``.
        progress: is told of every tensor that is read.
        threads: readers at work at once.
        checkpoint: what is being loaded, where `load` has opened it; else Transformers' own files are opened.
    """

    backend: str = "auto"
    device: torch.device | None = None
    progress: LoadProgress = field(default_factory=LoadProgress)
    threads: int = 4
    checkpoint: Checkpoint | None = None


_current: ContextVar[LoadOptions | None] = ContextVar("omnifp4_load_options", default=None)


def current_options() -> LoadOptions:
    """The options of the load under way."""
    return _current.get() or LoadOptions()


@contextmanager
def loading_with(options: LoadOptions) -> Iterator[None]:
    """Use `options` for a load inside."""
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)
