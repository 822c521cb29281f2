"""GPTQ's inner loop on a CUDA GPU: the twin of `gptq_loops` in Triton."""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from omnifp4.algorithms.gptq_cuda_kernels import round_columns

MOST_COLUMNS: Final = 256
"""That a program holds in registers; wider blocks of columns are cut, which changes only the order of sums."""

ROWS_PER_PROGRAM: Final = 8
WARPS: Final = 4


def columns_on_gpu(left: Tensor, scale: Tensor, spread: Tensor, columns: int) -> Tensor:
    """Codes of all columns in their order.

    Args:
        left: float32 ``[..., rows, width]``, contiguous; changed.
        scale: float32, what each code is multiplied by; the same shape.
        spread: float32 ``[..., width, width]``, upper: the inverse Hessian's Cholesky factor.
        columns: whose errors are spread at once over those after them.

    Returns:
        uint8 ``[..., rows, width]``.
    """
    *lead, rows, width = left.shape
    weights, units = (part.reshape(-1, rows, width).contiguous() for part in (left, scale))
    factors = spread.reshape(-1, width, width).contiguous()
    step = min(columns, MOST_COLUMNS, width)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=left.device)
    errors = torch.empty((len(weights), rows, step), dtype=torch.float32, device=left.device)
    grid = (len(weights), triton.cdiv(rows, ROWS_PER_PROGRAM))
    for begin in range(0, width, step):
        count = min(step, width - begin)
        round_columns[grid](
            weights[..., begin:], units[..., begin:], factors[:, begin:, begin:], codes[..., begin:], errors,
            rows, width, COUNT=count, ROWS=ROWS_PER_PROGRAM, COLUMNS=triton.next_power_of_2(step), ERROR_COLUMNS=step,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        end = begin + count
        if end < width:
            weights[..., end:] -= errors[..., :count] @ factors[:, begin:end, end:]
    return codes.reshape(*lead, rows, width)
