"""What a spoken digit sounds like to a classifier that knows real recordings only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Listener = Callable[[npt.NDArray[np.float32]], str]


def find_listener(config: Mapping[str, Any]) -> Listener | None:
    """The classifier for a checkpoint that speaks digits; None for any other."""
    return None
