"""NVFP4 on a CUDA GPU: the twin of `reference` in Triton.

It sums in the order of `fast_cpu`, so that both write the same bytes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton

from omnifp4.formats import fast_cuda_kernels as kernels
from omnifp4.formats.nvfp4 import AMAX_LIMIT, BLOCK_SIZE, E4M3_MAX_BITS, E4M3_VALUES, ScaleRule
from omnifp4.formats.reference import tensor_scale_for

BLOCKS_PER_PROGRAM = 32
"""A warp's, so that nothing passes through shared memory; more blocks or warps were slower on an H200."""
WARPS = 1
BYTES_PER_PROGRAM = 2048
MAGNITUDES_PER_PROGRAM = 16384
SCALES_PER_PROGRAM = 128

_RULES = {
    ScaleRule.MAX: kernels.MAX_RULE,
    ScaleRule.FOUR_OVER_SIX: kernels.FOUR_RULE,
    ScaleRule.SWEEP: kernels.SWEEP_RULE,
}


@dataclass(frozen=True, slots=True)
class CudaEncoding:
    """A weight in NVFP4 on a GPU; a leading dimension E is there if the weight had one.

    Attributes:
        packed: codes, two a byte, uint8 ``[(E,) out, in / 2]``.
        block_scale: E4M3 bits, uint8 ``[(E,) out, in / 16]``; ``.view(torch.float8_e4m3fn)`` gives the numbers.
        tensor_scale: float32 ``[E]`` or scalar.
        squared_error: ``sum((w - w')**2)``, float64 ``[E]`` or scalar.
        energy: ``sum(w**2)``, likewise.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    tensor_scale: torch.Tensor
    squared_error: torch.Tensor
    energy: torch.Tensor


@functools.cache
def _reciprocals(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / scale in float32, and 1 / scale / 16 in float16."""
    reciprocals = torch.reciprocal(torch.from_numpy(E4M3_VALUES[: E4M3_MAX_BITS + 1].copy()))
    return reciprocals.to(device), (reciprocals / 16).half().to(device)


def encode_cuda(
    weight: torch.Tensor,
    rule: ScaleRule = ScaleRule.SWEEP,
    tensor_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> CudaEncoding:
    """Encode a weight, or a batch of weights of one shape.

    Args:
        weight: bfloat16, float16 or float32 ``[out, in]`` or ``[E, out, in]``; copied if not contiguous.
        rule: how scales are chosen.
        tensor_scale: float32 scalar or ``[E]``, given where several tensors share one; otherwise each matrix gets
            its own.
        importance: float32 ``[in]`` or ``[out, in]``, non-negative, for every matrix of the batch; see `reference`.

    Raises:
        ValueError: a shape or type does not fit, or a value is NaN, infinite or too large.
    """
    if weight.ndim not in (2, 3) or weight.shape[-1] % BLOCK_SIZE or not weight.numel():
        raise ValueError(f"shape {tuple(weight.shape)} is not [out, in] or [E, out, in] with in a multiple of 16")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype {weight.dtype} is none of bfloat16, float16, float32")
    *batch, rows, columns = weight.shape
    matrices = weight.reshape(-1, rows, columns).contiguous()
    factor, row_size = _flat_importance(importance, rows, columns, matrices)
    amax = largest_magnitudes(matrices)
    amax_here = amax.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(amax.device).record_event() if amax.is_cuda else None
    look_later = rule is ScaleRule.SWEEP and tensor_scale is None
    if look_later:
        # Powers of two, made where they are needed; the host looks at the magnitudes while the kernel runs.
        scales, power_of_two = sweep_scales(amax), True
    else:
        _check_magnitudes(amax_here, copied)
        if tensor_scale is None:
            here = torch.tensor([float(tensor_scale_for(value, rule)) for value in amax_here.tolist()])
        else:
            here = tensor_scale.detach().float().cpu().reshape(-1).expand(len(matrices))
            if bool((amax_here.double() > 2.0**24 * here.double()).any()):
                raise ValueError("tensor_scale is far too small for the weight")
        scales, power_of_two = here.to(amax.device), bool((torch.frexp(here).mantissa == 0.5).all())
    packed, block_scale, sums = launch_encode(
        matrices,
        rule,
        scales,
        power_of_two=power_of_two,
        importance=factor,
        row_size=row_size,
    )
    totals = sums.sum(dim=1) * scales.double().square()[:, None]
    if look_later:
        _check_magnitudes(amax_here, copied, AMAX_LIMIT)
    return CudaEncoding(
        packed.reshape(*batch, rows, columns // 2),
        block_scale.reshape(*batch, rows, columns // BLOCK_SIZE),
        scales.reshape(batch),
        totals[:, 0].reshape(batch),
        totals[:, 1].reshape(batch),
    )


def largest_magnitudes(matrices: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each matrix of a contiguous ``[E, out, in]``, or what is not finite: float32 ``[E]``."""
    count, size = matrices.shape[0], matrices[0].numel()
    wide = matrices.dtype == torch.float32
    bits = torch.zeros(count, dtype=torch.int32, device=matrices.device)
    kernels.magnitude_kernel[(triton.cdiv(size, MAGNITUDES_PER_PROGRAM), count)](
        matrices.view(torch.int32 if wide else torch.int16),
        bits,
        size,
        MASK=0x7FFFFFFF if wide else 0x7FFF,
        VALUES=MAGNITUDES_PER_PROGRAM,
    )
    return (bits if wide else bits.to(torch.int16)).view(matrices.dtype).float()


def sweep_scales(amax: torch.Tensor) -> torch.Tensor:
    """`reference.tensor_scale_for` under the sweep for float32 magnitudes ``[E]``, where they are and unchecked."""
    scales = torch.empty_like(amax)
    grid = (triton.cdiv(amax.numel(), SCALES_PER_PROGRAM),)
    kernels.sweep_scale_kernel[grid](amax, scales, amax.numel(), SCALES=SCALES_PER_PROGRAM)
    return scales


def _check_magnitudes(amax: torch.Tensor, copied: torch.cuda.Event | None, limit: float = math.inf) -> None:
    if copied is not None:
        copied.synchronize()
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("the weight has NaN or infinite values")
    if bool((amax > limit).any()):
        raise ValueError(f"largest magnitude {float(amax.max())} cannot be encoded; at most {limit:g} is allowed")


def launch_encode(
    matrices: torch.Tensor,
    rule: ScaleRule,
    scales: torch.Tensor,
    *,
    power_of_two: bool,
    importance: torch.Tensor | None = None,
    row_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel without looking at the values: nothing is checked and the host waits for nothing.

    Args:
        matrices: ``[E, out, in]``, contiguous, finite.
        rule: how scales are chosen.
        scales: tensor scales, float32 ``[E]``, on the same device.
        power_of_two: whether every one of `scales` is a power of two.
        importance: float32 values of a matrix, or of one row of it.
        row_size: `in` where `importance` is one row, otherwise 0.

    Returns:
        packed uint8 ``[E, out, in / 2]``, block scales uint8 ``[E, out, in / 16]``, and partial sums float64
        ``[E, programs, 2]`` of squared error and energy in units of the squared tensor scale.
    """
    count, rows, columns = matrices.shape
    blocks, device = rows * columns // BLOCK_SIZE, matrices.device
    packed = torch.empty((count, rows, columns // 2), dtype=torch.uint8, device=device)
    block_scale = torch.empty((count, rows, columns // BLOCK_SIZE), dtype=torch.uint8, device=device)
    programs = triton.cdiv(blocks, BLOCKS_PER_PROGRAM)
    weighted = importance is not None and rule is not ScaleRule.MAX
    halves = rule is ScaleRule.SWEEP and power_of_two and not weighted and matrices.dtype == torch.bfloat16
    sums = torch.empty((count, programs, 2), dtype=torch.float64, device=device)
    kernels.encode_kernel[(programs, count)](
        matrices,
        scales if importance is None else importance,
        scales,
        *_reciprocals(device),
        packed.view(torch.int32),
        block_scale,
        sums,
        blocks,
        row_size,
        RULE=_RULES[rule],
        POWER_OF_TWO=power_of_two,
        WEIGHTED=weighted,
        HALVES=halves,
        BLOCKS=BLOCKS_PER_PROGRAM,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return packed, block_scale, sums


def _flat_importance(
    importance: torch.Tensor | None, rows: int, columns: int, weight: torch.Tensor
) -> tuple[torch.Tensor | None, int]:
    if importance is None:
        return None, 0
    if importance.shape not in ((columns,), (1, columns), (rows, columns)):
        raise ValueError(f"importance has shape {tuple(importance.shape)}; [in] or [out, in] is needed")
    factor = importance.to(weight.device, torch.float32).contiguous()
    if not bool((torch.isfinite(factor) & (factor >= 0)).all()):
        raise ValueError("importance has values that are negative, NaN or infinite")
    return factor, columns if factor.numel() == columns else 0


def decode_cuda(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    tensor_scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The values that codes and scales stand for; float32 products as in `reference.decode`, then rounded to `dtype`.

    Args:
        packed: uint8 ``[(E,) out, in / 2]``, contiguous.
        block_scale: E4M3 bits, uint8, or float8_e4m3fn, ``[(E,) out, in / 16]``.
        tensor_scale: float32 scalar or ``[E]``.
        dtype: float32, bfloat16 or float16.
    """
    if block_scale.shape != (*packed.shape[:-1], packed.shape[-1] // 8) or packed.shape[-1] % 8:
        raise ValueError(f"packed {tuple(packed.shape)} and block_scale {tuple(block_scale.shape)} do not fit")
    factor = tensor_scale.float().reshape(-1, *[1] * (block_scale.ndim - 1)) if tensor_scale.ndim else tensor_scale
    scale = (block_scale.view(torch.float8_e4m3fn).float() * factor).contiguous()
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=packed.device)
    source = packed.contiguous()
    kernels.decode_kernel[(triton.cdiv(source.numel(), BYTES_PER_PROGRAM),)](
        source, scale, out, source.numel(), BYTES=BYTES_PER_PROGRAM, enable_fp_fusion=False
    )
    return out
