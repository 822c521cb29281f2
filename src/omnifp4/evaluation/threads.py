"""How many threads a small model is run with.

Threads of one operation wait for each other by spinning. Where the matrices are tiny, and another process wants the
same cores, the waiting takes longer than the work: 14 samples of the tiny model took 0.4 s on one thread of a busy
machine with two cores, and 18 s on two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

SMALL_WIDTH: Final = 512
"""Hidden states up to this width make operations that one core does in less time than it takes to share them."""


@contextmanager
def suited_threads(hidden_size: int, device: torch.device) -> Iterator[None]:
    """Inside, a model of this width runs on one thread if it is small and on a CPU; afterwards all is as before."""
    if device.type != "cpu" or hidden_size > SMALL_WIDTH:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
