"""How many threads torch takes while the tiny models run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, one: two on matrices this small wait for each other for most of the time."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
