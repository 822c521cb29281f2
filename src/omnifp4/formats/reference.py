"""NVFP4 arithmetic as plainly as it can be said; the fast twins must agree with it.

All arithmetic is float32 with round-to-nearest-even, in the order written here, so that a twin on any machine can
give the same bits. What a twin may do differently is the order of the sums that compare two scales: then the choice
between scales of nearly equal error may differ, and nothing else.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from omnifp4.formats.nvfp4 import (
    AMAX_LIMIT,
    BLOCK_SIZE,
    E2M1_MAGNITUDES,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX_BITS,
    E4M3_MIN_BITS,
    E4M3_VALUES,
    SCALE_HEADROOM,
    SWEEP_OFFSETS,
    TENSOR_SCALE_MIN,
    Float32Array,
    NVFP4Tensor,
    ScaleRule,
    UInt8Array,
    pack,
    unpack,
)

E2M1_MIDPOINTS = (E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2
E4M3_POSITIVE = E4M3_VALUES[E4M3_MIN_BITS : E4M3_MAX_BITS + 1]
E2M1_COLUMN = E2M1_MAGNITUDES[1:, None]
E4M3_MIDPOINTS = (E4M3_VALUES[:E4M3_MAX_BITS] + E4M3_VALUES[1 : E4M3_MAX_BITS + 1]) / 2


def round_to_e2m1(values: Float32Array) -> UInt8Array:
    """Round to the nearest code, ties to the even code, beyond 6 to 6: float32 to uint8 0..15 of the same shape.

    The sign bit is kept, so a small negative value becomes code 8, negative zero.
    """
    magnitude = np.abs(values)
    below = np.searchsorted(E2M1_MIDPOINTS, magnitude, side="left")
    above = np.searchsorted(E2M1_MIDPOINTS, magnitude, side="right")
    nearest = np.where(below % 2 == 0, below, above)
    return (nearest + np.where(np.signbit(values), 8, 0)).astype(np.uint8)


def round_to_e4m3(values: Float32Array) -> UInt8Array:
    """Round non-negative values to E4M3 bits, ties to even, held within [2**-9, 448]: float32 to uint8."""
    below = np.searchsorted(E4M3_MIDPOINTS, values, side="left")
    above = np.searchsorted(E4M3_MIDPOINTS, values, side="right")
    nearest = np.where(below % 2 == 0, below, above)
    return np.clip(nearest, E4M3_MIN_BITS, E4M3_MAX_BITS).astype(np.uint8)


def tensor_scale_for(amax: float, rule: ScaleRule) -> np.float32:
    """The tensor scale for a tensor, or a group of tensors, whose largest magnitude is `amax`.

    Raises:
        ValueError: `amax` is NaN, infinite, or too large to encode.
    """
    if not amax <= AMAX_LIMIT:
        raise ValueError(f"largest magnitude {amax} cannot be encoded; at most {AMAX_LIMIT:g} is allowed")
    if amax == 0.0:
        return np.float32(1.0)
    scale = np.float32(amax) / np.float32(E2M1_MAX * SCALE_HEADROOM[rule])
    if rule is ScaleRule.SWEEP:
        fraction, exponent = math.frexp(scale)
        scale = np.float32(math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent))
    return _agreeing_in_bf16(max(scale, np.float32(TENSOR_SCALE_MIN)))


def _agreeing_in_bf16(tensor_scale: np.float32) -> np.float32:
    """The scale, or its float32 neighbour, whose decoded weights are the same BF16 numbers in both dialects.

    One dialect multiplies a block scale by this number, the other divides by its stored reciprocal. The two differ in
    the last bit of float32, which shows in BF16 where a product lies half-way: for about one tensor in fifty. There a
    step of one float32 unit moves the products off the tie. A power of two agrees as it stands.
    """
    neighbours = (np.nextafter(tensor_scale, np.float32(np.inf)), np.nextafter(tensor_scale, np.float32(0.0)))
    for scale in (tensor_scale, *neighbours):
        multiplied, divided = E4M3_POSITIVE * scale, E4M3_POSITIVE / (np.float32(1.0) / scale)
        if np.array_equal(round_to_bf16(multiplied * E2M1_COLUMN), round_to_bf16(divided * E2M1_COLUMN)):
            return np.float32(scale)
    return tensor_scale


def round_to_bf16(values: Float32Array) -> npt.NDArray[np.uint16]:
    """Round finite float32 to BF16 bits, ties to even: uint16 of the same shape."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def blocks_of(weight: Float32Array) -> Float32Array:
    """View ``[out, in]`` as ``[out, in / 16, 16]``."""
    return weight.reshape(weight.shape[0], -1, BLOCK_SIZE)


def choose_block_scales(
    weight: Float32Array, tensor_scale: np.float32, rule: ScaleRule, importance: Float32Array | None = None
) -> UInt8Array:
    """The E4M3 block scales that `rule` picks.

    Args:
        weight: float32 ``[out, in]``, finite, `in` a multiple of 16.
        tensor_scale: from `tensor_scale_for`.
        rule: see `ScaleRule`.
        importance: float32 broadcastable to ``[out, in]``, non-negative; weighs each squared error. Max scaling
            ignores it. A block without any importance counts as evenly important.

    Returns:
        uint8 ``[out, in / 16]``, never the bits of zero or NaN.
    """
    blocks = blocks_of(weight)
    block_amax = np.abs(blocks).max(axis=-1)
    by_max = round_to_e4m3(block_amax / np.float32(E2M1_MAX * tensor_scale))
    if rule is ScaleRule.MAX:
        return by_max
    if rule is ScaleRule.FOUR_OVER_SIX:
        candidates = [by_max, round_to_e4m3(block_amax / np.float32(4.0 * tensor_scale))]
    else:
        centre = by_max.astype(np.int32)
        candidates = [np.clip(centre + o, E4M3_MIN_BITS, E4M3_MAX_BITS).astype(np.uint8) for o in SWEEP_OFFSETS]
    factor = None if importance is None else _block_importance(np.broadcast_to(importance, weight.shape))
    best, best_error = by_max, np.full(by_max.shape, np.inf)
    for scale in candidates:
        error = _squared_error(blocks, scale, tensor_scale, factor)
        wins = error < best_error
        best, best_error = np.where(wins, scale, best), np.where(wins, error, best_error)
    return best


def _block_importance(importance: Float32Array) -> Float32Array:
    """As blocks; one where a whole block has none, since there every scale would seem perfect."""
    factor = blocks_of(importance)
    return np.where((factor == 0).all(axis=-1, keepdims=True), np.float32(1.0), factor)


def _squared_error(
    blocks: Float32Array, block_scale: UInt8Array, tensor_scale: np.float32, factor: Float32Array | None
) -> np.ndarray:
    """Squared error of each block under a scale, in units of tensor_scale squared (so that nothing underflows)."""
    scale = E4M3_VALUES[block_scale][..., None]
    codes = round_to_e2m1(blocks / (scale * tensor_scale))
    difference = (blocks / tensor_scale).astype(np.float64) - E2M1_VALUES[codes] * scale.astype(np.float64)
    squares = difference**2
    return np.asarray((squares if factor is None else squares * factor).sum(axis=-1))


def encode_codes(weight: Float32Array, block_scale: UInt8Array, tensor_scale: np.float32) -> UInt8Array:
    """Round every value under given scales: float32 ``[out, in]`` to codes uint8 ``[out, in]``."""
    scale = E4M3_VALUES[block_scale] * tensor_scale
    return round_to_e2m1(blocks_of(weight) / scale[..., None]).reshape(weight.shape)


def encode(
    weight: Float32Array,
    rule: ScaleRule = ScaleRule.SWEEP,
    *,
    tensor_scale: np.float32 | None = None,
    importance: Float32Array | None = None,
) -> NVFP4Tensor:
    """Encode a weight.

    Args:
        weight: float32 ``[out, in]``.
        rule: how scales are chosen.
        tensor_scale: given where several tensors share one; otherwise from this tensor's largest magnitude.
        importance: see `choose_block_scales`.

    Raises:
        ValueError: not two-dimensional, `in` not a multiple of 16, or a value is NaN, infinite or too large.
    """
    check_encodable(weight)
    if tensor_scale is None:
        tensor_scale = tensor_scale_for(float(np.abs(weight).max(initial=0.0)), rule)
    block_scale = choose_block_scales(weight, tensor_scale, rule, importance)
    return NVFP4Tensor(pack(encode_codes(weight, block_scale, tensor_scale)), block_scale, tensor_scale)


def check_encodable(weight: Float32Array) -> None:
    """Raise ValueError unless `weight` is finite, ``[out, in]``, with `in` a multiple of 16."""
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE:
        raise ValueError(f"shape {weight.shape} is not [out, in] with in a multiple of {BLOCK_SIZE}")
    if not np.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values")


def decode(tensor: NVFP4Tensor) -> Float32Array:
    """The float32 ``[out, in]`` values that the codes and scales stand for: ``e2m1 * (block_scale * tensor_scale)``."""
    scale = E4M3_VALUES[tensor.block_scale] * tensor.tensor_scale
    values = E2M1_VALUES[unpack(tensor.packed)]
    return np.asarray(blocks_of(values) * scale[..., None], dtype=np.float32).reshape(tensor.shape)


def relative_squared_error(weight: Float32Array, decoded: Float32Array) -> float:
    """``sum((w - w')**2) / sum(w**2)`` in float64; 0 for a weight that is zero everywhere and decoded as zero."""
    difference = weight.astype(np.float64) - decoded
    energy = float(np.square(weight, dtype=np.float64).sum())
    loss = float(np.square(difference).sum())
    return loss / energy if energy else (0.0 if loss == 0.0 else float("inf"))
