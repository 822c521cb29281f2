"""Source values, as they lie on disk, as float32, and the way back."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.formats.nvfp4 import Float32Array
from omnifp4.formats.reference import round_to_bf16

F16_MAX: Final = np.float32(65504.0)


def widen(raw: npt.NDArray[Any], dtype: str) -> Float32Array:
    """The float32 of source values of any shape; F32 is not copied.

    Args:
        raw: BF16 as uint16 bits, F16 as float16 or its bits, F32 as float32 or its bits.
        dtype: ``"BF16"``, ``"F16"`` or ``"F32"``.

    Raises:
        ValueError: `dtype` is none of these.
    """
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "F32":
        return raw.view(np.float32)
    raise ValueError(f"dtype {dtype!r} is none of BF16, F16, F32")


def narrow(wide: Float32Array, dtype: str) -> npt.NDArray[np.generic]:
    """Finite float32 values in a source's own type, as bits where numpy lacks it; the largest of F16 is not passed."""
    if dtype == "BF16":
        return round_to_bf16(wide)
    # Near the end of F16's range a value may round up beyond it.
    return wide.clip(-F16_MAX, F16_MAX).astype(np.float16) if dtype == "F16" else wide
