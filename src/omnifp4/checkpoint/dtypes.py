"""The element types that safetensors headers name."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np

DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by the name in the header."""

NUMPY_DTYPES: Final[dict[str, np.dtype[np.generic]]] = {
    "BOOL": np.dtype(np.uint8), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(np.uint8), "F8_E5M2": np.dtype(np.uint8), "F8_E8M0": np.dtype(np.uint8),
    "F8_E4M3FNUZ": np.dtype(np.uint8), "F8_E5M2FNUZ": np.dtype(np.uint8),
    "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "F64": np.dtype("<f8"), "C64": np.dtype("<c8"),
}  # fmt: skip
"""The numpy type that holds an element's bits; types that numpy lacks (BF16, FP8) come as unsigned integers.

Types narrower than a byte have none.
"""

WIDE_FLOATS: Final = ("BF16", "F16", "F32")
"""Types of a weight that can be encoded."""


MAX_DIMENSIONS: Final = 32
"""Most dimensions a tensor may have: what every numpy can hold."""

MAX_ELEMENTS: Final = 2**63
"""A shape with as many elements is absurd, also where a dimension of zero makes them none."""


@lru_cache(maxsize=4096)
def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; ValueError where the shape is absurd or sub-byte elements do not fill whole bytes."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions are absurd; at most {MAX_DIMENSIONS} are allowed")
    span = math.prod(size for size in shape if size)
    if span >= MAX_ELEMENTS:
        raise ValueError(f"shape {list(shape)} is absurd")
    elements = 0 if 0 in shape else span
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{elements} elements of {dtype} do not fill whole bytes")
    return bits // 8
