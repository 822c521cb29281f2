"""NVFP4 on the CPU at speed: the twin of `reference` in compiled loops.

Source values come as they lie on disk, so a BF16 tensor is read once and never widened in memory. One call is one
thread and holds no lock of the interpreter: to use several cores, call from several threads.

Codes equal the reference bit for bit under equal scales. Scales equal the reference's except where two candidates err
by so nearly the same that float32 sums rank them otherwise than float64 sums. The bytes do not depend on the machine.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from omnifp4.formats import fast_cpu_kernels as kernels
from omnifp4.formats.nvfp4 import (
    BLOCK_SIZE,
    E4M3_VALUES,
    EncodeStats,
    Float32Array,
    NVFP4Tensor,
    ScaleRule,
    UInt8Array,
)
from omnifp4.formats.reference import tensor_scale_for

__all__ = [
    "CompareStats",
    "EncodeStats",
    "Scan",
    "bf16_bits",
    "compare",
    "decode",
    "decode_into",
    "effective_scale",
    "encode",
    "encode_into",
    "scan",
    "source_bits",
]

UInt16Array = npt.NDArray[np.uint16]

KINDS: Final = {"BF16": kernels.BF16, "F16": kernels.F16, "F32": kernels.F32}
"""Source dtypes, by the names that safetensors gives them."""

_INFINITY_BITS: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

LARGEST_IN_TENSOR_SCALES: Final = 2.0**24
"""Largest magnitude in units of the tensor scale; beyond it float32 could not tell candidates apart."""

_RULES: Final = {
    ScaleRule.MAX: kernels.MAX_RULE,
    ScaleRule.FOUR_OVER_SIX: kernels.FOUR_RULE,
    ScaleRule.SWEEP: kernels.SWEEP_RULE,
}


class Scan(NamedTuple):
    """What one look at a tensor tells.

    Attributes:
        amax: largest magnitude; infinite or NaN if such a value is there.
        nonfinite_index: flat index of the first NaN or infinity, -1 if there is none.
    """

    amax: float
    nonfinite_index: int


class CompareStats(NamedTuple):
    """How encoded values differ from their originals.

    Attributes:
        squared_error: ``sum((w - w')**2)`` over pairs of finite values.
        energy: ``sum(w**2)`` over the same.
        max_abs_error: largest ``abs(w - w')`` over the same.
        nonfinite: how many values are NaN or infinite, in the original or decoded.
        zero_scales: blocks whose scale is zero.
        nan_scales: blocks whose scale is NaN.
        swapped_squared_error: what squared_error would be if the two codes of every byte changed places; a value
            below squared_error means that they did.
    """

    squared_error: float
    energy: float
    max_abs_error: float
    nonfinite: int
    zero_scales: int
    nan_scales: int
    swapped_squared_error: float


def source_bits(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The flat bits of source values; copies only what is not C-contiguous.

    Args:
        raw: any shape; BF16 as uint16 bits (or a 2-byte type that holds them), F16 as float16 or uint16 bits, F32 as
            float32 or uint32 bits.
        dtype: ``"BF16"``, ``"F16"`` or ``"F32"``.

    Returns:
        uint16 or, for F32, uint32, one-dimensional.

    Raises:
        ValueError: `dtype` is none of these, or the values are not of its size.
    """
    if dtype not in KINDS:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(KINDS)}")
    width = np.dtype(np.uint32 if dtype == "F32" else np.uint16)
    if raw.dtype.itemsize != width.itemsize:
        raise ValueError(f"{dtype} values need {width.itemsize} bytes each; got an array of {raw.dtype}")
    if raw.ndim == 2 and not raw.flags.c_contiguous and raw.strides[0] == raw.itemsize:
        source = raw.T.view(width)
        target = np.empty(raw.shape, dtype=width)
        kernels.transpose_bits(source, target)
        return target.reshape(-1)
    return np.ascontiguousarray(raw).reshape(-1).view(width)


def scan(raw: npt.NDArray[Any], dtype: str) -> Scan:
    """Largest magnitude and first NaN or infinity, at the speed of memory. Arguments as in `source_bits`."""
    bits = source_bits(raw, dtype)
    if dtype == "F32":
        largest = int(kernels.largest_magnitude_bits_32(bits))
        amax = float(np.uint32(largest).view(np.float32))
    else:
        largest = int(kernels.largest_magnitude_bits_16(bits))
        half = dtype == "F16"
        amax = float(np.uint16(largest).view(np.float16) if half else np.uint32(largest << 16).view(np.float32))
    infinity = _INFINITY_BITS[dtype]
    if largest < infinity:
        return Scan(amax, -1)
    return Scan(amax, int(kernels.first_at_least(bits, bits.dtype.type(infinity))))


def encode_into(
    raw: npt.NDArray[Any],
    dtype: str,
    rule: ScaleRule,
    tensor_scale: np.float32,
    packed_out: UInt8Array,
    block_scale_out: UInt8Array,
    importance: Float32Array | None = None,
) -> EncodeStats:
    """Encode source values into given arrays.

    Args:
        raw: ``[out, in]``, finite, types as in `source_bits`; a view that is not C-contiguous is copied first.
        dtype: ``"BF16"``, ``"F16"`` or ``"F32"``.
        rule: how scales are chosen.
        tensor_scale: from `reference.tensor_scale_for`, of this tensor or of the group that shares it.
        packed_out: uint8 ``[out, in / 2]``, C-contiguous.
        block_scale_out: uint8 ``[out, in / 16]``, C-contiguous.
        importance: float32, ``[in]`` or ``[out, in]``, non-negative; weighs squared errors when scales are chosen.
            A block without any importance counts as evenly important.

    Returns:
        The squared error (never weighed) and the energy of the source.

    Raises:
        ValueError: a shape or type does not fit, a value is NaN or infinite, `importance` is negative, or `tensor_scale` is
            far too small.
    """
    if raw.ndim != 2 or raw.shape[1] % BLOCK_SIZE:
        raise ValueError(f"shape {raw.shape} is not [out, in] with in a multiple of {BLOCK_SIZE}")
    rows, columns = raw.shape
    packed = _flat_output(packed_out, (rows, columns // 2), "packed_out")
    block_scale = _flat_output(block_scale_out, (rows, columns // BLOCK_SIZE), "block_scale_out")
    bits = source_bits(raw, dtype)
    if not bits.size:
        return EncodeStats(0.0, 0.0)
    scale = np.float32(tensor_scale)
    factor = np.empty(0, dtype=np.float32)
    if importance is not None:
        if importance.shape not in ((columns,), (1, columns), (rows, columns)):
            raise ValueError(f"importance has shape {importance.shape}; weight {raw.shape} needs [in] or [out, in]")
        factor = np.ascontiguousarray(importance, dtype=np.float32).reshape(-1)
        if not (np.isfinite(factor) & (factor >= 0)).all():
            raise ValueError("importance has values that are negative, NaN or infinite")
    row_size = columns if factor.size == columns else 0
    error, energy, amax = kernels.encode_blocks(
        bits, KINDS[dtype], _RULES[rule], scale, factor, row_size, packed, block_scale
    )
    if not np.isfinite(energy) or not amax <= LARGEST_IN_TENSOR_SCALES * float(scale):
        raise ValueError(f"the weight has NaN or infinite values, or tensor_scale {scale} is far too small for it")
    unit = float(scale) ** 2
    if amax < 2.0**-40 * float(scale):
        # Every code is zero, and squares would have underflowed.
        energy = float(kernels.energy(bits, KINDS[dtype]))
        return EncodeStats(energy, energy)
    return EncodeStats(float(error) * unit, float(energy) * unit)


def encode(
    raw: npt.NDArray[Any],
    dtype: str,
    rule: ScaleRule = ScaleRule.SWEEP,
    *,
    tensor_scale: np.float32 | None = None,
    importance: Float32Array | None = None,
) -> tuple[NVFP4Tensor, EncodeStats]:
    """Encode source values; arguments as in `encode_into`.

    Raises:
        ValueError: a shape or type does not fit, or a value is NaN, infinite or too large.
    """
    found = scan(raw, dtype)
    if found.nonfinite_index >= 0:
        raise ValueError(f"the weight has NaN or infinite values, the first at flat index {found.nonfinite_index}")
    if raw.ndim != 2 or raw.shape[1] % BLOCK_SIZE:
        raise ValueError(f"shape {raw.shape} is not [out, in] with in a multiple of {BLOCK_SIZE}")
    scale = tensor_scale_for(found.amax, rule) if tensor_scale is None else np.float32(tensor_scale)
    packed = np.empty((raw.shape[0], raw.shape[1] // 2), dtype=np.uint8)
    block_scale = np.empty((raw.shape[0], raw.shape[1] // BLOCK_SIZE), dtype=np.uint8)
    stats = encode_into(raw, dtype, rule, scale, packed, block_scale, importance)
    return NVFP4Tensor(packed, block_scale, scale), stats


def effective_scale(block_scale: UInt8Array, tensor_scale: np.float32, *, reciprocal: bool = False) -> Float32Array:
    """What a code is multiplied by: float32 of the shape of `block_scale`, one rounding each.

    Args:
        block_scale: E4M3 bits, uint8.
        tensor_scale: the number stored in the checkpoint.
        reciprocal: that number divides, as compressed-tensors stores it, instead of multiplying.
    """
    with np.errstate(all="ignore"):
        table = E4M3_VALUES / np.float32(tensor_scale) if reciprocal else E4M3_VALUES * np.float32(tensor_scale)
    return table.astype(np.float32)[block_scale]


def decode_into(packed: UInt8Array, scale: Float32Array, out: Float32Array | UInt16Array) -> None:
    """Decode into a given array.

    Args:
        packed: uint8 ``[out, in / 2]``.
        scale: float32 ``[out, in / 16]``, from `effective_scale`.
        out: ``[out, in]``, C-contiguous; float32, or uint16 for BF16 bits (rounded to nearest, ties to even).

    Raises:
        ValueError: a shape or type does not fit.
    """
    rows, half = packed.shape
    if scale.shape != (rows, half // 8) or half % 8:
        raise ValueError(f"packed {packed.shape} and scale {scale.shape} are not [out, in / 2] and [out, in / 16]")
    if out.shape != (rows, half * 2) or not out.flags.c_contiguous or out.dtype not in (np.float32, np.uint16):
        raise ValueError(f"out must be C-contiguous float32 or uint16 {(rows, half * 2)}; got {out.dtype} {out.shape}")
    run = kernels.decode_float32 if out.dtype == np.float32 else kernels.decode_bf16
    run(np.ascontiguousarray(packed).reshape(-1), np.ascontiguousarray(scale).reshape(-1), out.reshape(-1))


def decode(tensor: NVFP4Tensor) -> Float32Array:
    """The float32 ``[out, in]`` values that a tensor stands for; equals `reference.decode`."""
    out = np.empty(tensor.shape, dtype=np.float32)
    decode_into(tensor.packed, effective_scale(tensor.block_scale, tensor.tensor_scale), out)
    return out


def compare(
    raw: npt.NDArray[Any],
    dtype: str,
    packed: UInt8Array,
    block_scale: UInt8Array,
    tensor_scale: np.float32,
    reciprocal: bool = False,
) -> CompareStats:
    """Compare encoded values with their originals in one pass, as a proof needs it.

    Args:
        raw: the originals ``[out, in]``, types as in `source_bits`.
        dtype: ``"BF16"``, ``"F16"`` or ``"F32"``.
        packed: uint8 ``[out, in / 2]``.
        block_scale: E4M3 bits, uint8 ``[out, in / 16]``.
        tensor_scale: the number stored in the checkpoint.
        reciprocal: see `effective_scale`.

    Raises:
        ValueError: a shape or type does not fit.
    """
    if raw.ndim != 2 or packed.shape != (raw.shape[0], raw.shape[1] // 2) or raw.shape[1] % BLOCK_SIZE:
        raise ValueError(f"weight {raw.shape} and packed {packed.shape} are not [out, in] and [out, in / 2]")
    if block_scale.shape != (raw.shape[0], raw.shape[1] // BLOCK_SIZE):
        raise ValueError(f"block_scale {block_scale.shape} is not [out, in / 16] of weight {raw.shape}")
    scale = effective_scale(block_scale, tensor_scale, reciprocal=reciprocal).reshape(-1)
    error, energy, swapped, largest, nonfinite = kernels.compare_blocks(
        source_bits(raw, dtype), KINDS[dtype], np.ascontiguousarray(packed).reshape(-1), scale
    )
    magnitudes = block_scale & 0x7F
    return CompareStats(
        squared_error=float(error),
        energy=float(energy),
        max_abs_error=float(largest),
        nonfinite=int(nonfinite),
        zero_scales=int(np.count_nonzero(magnitudes == 0)),
        nan_scales=int(np.count_nonzero(magnitudes == 0x7F)),
        swapped_squared_error=float(swapped),
    )


def bf16_bits(values: Float32Array) -> UInt16Array:
    """Round float32 to BF16 bits, nearest, ties to even: uint16 of the same shape."""
    bits = np.empty(values.shape, dtype=np.uint16)
    kernels.narrow_bf16_array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1), bits.reshape(-1))
    return bits


def _flat_output(out: UInt8Array, shape: tuple[int, int], name: str) -> UInt8Array:
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous uint8 {shape}; got {out.dtype} {out.shape}")
    return out.reshape(-1)
