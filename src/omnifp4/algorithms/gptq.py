"""GPTQ with static scales: columns are rounded one after another, and what is left makes up for the error of each.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323).
All scales are fixed from the original weights first, so that columns can be taken in order of falling ``diag(H)`` while
every column keeps the scale of its own block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Final, NamedTuple

import torch
from torch import Tensor

from omnifp4.algorithms.errors import DAMPING, damped
from omnifp4.algorithms.grid import Codes, column_scale, e2m1_values, round_to_e2m1

COLUMNS: Final = 128
"""Columns whose errors are spread at once over the columns after them."""

SMALLEST_SOLVE: Final = 256
"""Width up to which a triangular matrix is inverted whole."""

MORE_DAMPING: Final = (1.0, 10.0, 100.0)
"""Factors of the damping that are tried in turn where a Hessian is still singular."""


class GptqResult(NamedTuple):
    """What `gptq` made.

    Attributes:
        rounded: codes and scales.
        damping: that each Hessian needed, float32 ``[...]``; infinite where none was enough and weights were rounded to
            the nearest.
    """

    rounded: Codes
    damping: Tensor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    *,
    damping: float = DAMPING,
    columns: int = COLUMNS,
) -> GptqResult:
    """Round a weight so that its outputs change little.

    Args:
        weight: float32 ``[..., out, in]``.
        hessian: ``E[x x']``, float32 ``[..., in, in]``. A singular one is damped more; a zero one makes plain rounding.
        block_scale: E4M3 bits, uint8 ``[..., out, in / 16]``.
        tensor_scale: float32 ``[...]``.
        damping: share of the mean diagonal that is added to the diagonal.
        columns: see `COLUMNS`.
    """
    lead, (rows, width) = weight.shape[:-2], weight.shape[-2:]
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    across = order[..., None, :].expand(*lead, rows, width)
    left = weight.gather(-1, across)
    scale = column_scale(block_scale, tensor_scale).expand_as(weight).gather(-1, across)
    sorted_hessian = hessian.gather(-1, order[..., None, :].expand_as(hessian))
    sorted_hessian = sorted_hessian.gather(-2, order[..., :, None].expand_as(hessian))
    spread, used = _inverse_factor(sorted_hessian, damping)
    codes = _run_for(weight.device)(left, scale, spread, columns)
    back = order.argsort(dim=-1)[..., None, :].expand(*lead, rows, width)
    return GptqResult(Codes(codes.gather(-1, back), block_scale, tensor_scale), used)


def _run_for(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """What rounds the columns there."""
    if device.type == "cpu":
        return _compiled_columns
    if device.type == "cuda" and find_spec("triton") is not None:
        from omnifp4.algorithms.gptq_cuda import columns_on_gpu

        return columns_on_gpu
    return _columns


def _columns(left: Tensor, scale: Tensor, spread: Tensor, columns: int) -> Tensor:
    """Codes of all columns in their order, by torch: column after column for all rows and experts at once."""
    # Columns as rows: each step then works on contiguous memory.
    left, scale = left.mT.contiguous(), scale.mT.contiguous()
    width = left.shape[-2]
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for begin in range(0, width, columns):
        end = min(begin + columns, width)
        errors = torch.empty_like(left[..., begin:end, :])
        block, factor = left[..., begin:end, :], spread[..., begin:end, begin:end]
        for column in range(end - begin):
            values, unit = block[..., column, :], scale[..., begin + column, :]
            code = round_to_e2m1(values / unit)
            codes[..., begin + column, :] = code
            errors[..., column, :] = (values - e2m1_values(code) * unit) / factor[..., column, column, None]
            rest = factor[..., column, column + 1 :, None] * errors[..., column, None, :]
            block[..., column + 1 :, :] -= rest
        left[..., end:, :] -= spread[..., begin:end, end:].mT @ errors
    return codes.mT


def _compiled_columns(left: Tensor, scale: Tensor, spread: Tensor, columns: int) -> Tensor:
    """`_columns` by compiled loops on the CPU, the rows shared among threads; the same codes but for ties of sums."""
    from omnifp4.algorithms.gptq_loops import round_columns

    rows, width = left.shape[-2:]
    codes = torch.empty(left.shape, dtype=torch.uint8)
    threads = min(torch.get_num_threads(), max(1, rows // 16))
    step = -(-rows // threads)
    lots = [slice(first, first + step) for first in range(0, rows, step)]
    with ThreadPoolExecutor(threads) as pool:
        for number in range(math.prod(left.shape[:-2])):
            weight, unit, factor = (part.reshape(-1, *part.shape[-2:])[number] for part in (left, scale, spread))
            found = codes.view(-1, rows, width)[number]
            for begin in range(0, width, columns):
                end = min(begin + columns, width)
                block, errors = weight[:, begin:end].contiguous(), torch.empty(rows, end - begin)
                units, own = unit[:, begin:end].contiguous(), factor[begin:end, begin:end].contiguous()
                made = torch.empty(block.shape, dtype=torch.uint8)

                def run(
                    lot: slice,
                    b: Tensor = block,
                    u: Tensor = units,
                    f: Tensor = own,
                    c: Tensor = made,
                    e: Tensor = errors,
                ) -> None:
                    round_columns(b[lot].numpy(), u[lot].numpy(), f.numpy(), c[lot].numpy(), e[lot].numpy())

                list(pool.map(run, lots))
                found[:, begin:end] = made
                weight[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper U with ``U' U = H**-1``, and the damping that it took; the identity where none was enough."""
    factor = torch.zeros_like(hessian)
    used = torch.full(hessian.shape[:-2], torch.inf, device=hessian.device)
    for more in MORE_DAMPING:
        # Turned by half a circle, the lower factor of H is an upper one, and its inverse is U.
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping * more).flip(-2, -1))
        found = _inverse_of_upper(lower.flip(-2, -1))
        good = (failed == 0) & found.isfinite().all(dim=-1).all(dim=-1) & used.isinf()
        factor = torch.where(good[..., None, None], found, factor)
        used = torch.where(good, torch.full_like(used, damping * more), used)
        if not bool(used.isinf().any()):
            break
    if bool(used.isinf().any()):
        identity = torch.eye(hessian.shape[-1], device=hessian.device)
        factor = torch.where(used.isinf()[..., None, None], identity, factor)
    return factor, used


def _inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse of upper triangular matrices ``[..., n, n]``: halves of it by products, which leave zeros alone.

    A solve with the identity does three times the arithmetic.
    """
    width = upper.shape[-1]
    if width <= SMALLEST_SOLVE:
        identity = torch.eye(width, device=upper.device).expand_as(upper)
        solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return solved
    half = width // 2
    first, last = _inverse_of_upper(upper[..., :half, :half]), _inverse_of_upper(upper[..., half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[..., :half, :half], inverse[..., half:, half:] = first, last
    inverse[..., :half, half:] = -(first @ upper[..., :half, half:] @ last)
    return inverse
