"""Triton kernel of `gptq_cuda`.

To be launched with ``enable_fp_fusion=False``, so that products and sums round as torch's do.
"""

# Triton infers these types itself, and its decorator hides them from a checker.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_columns(
    left,
    scale,
    factor,
    codes,
    errors,
    rows,
    width,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ERROR_COLUMNS: tl.constexpr,
):
    """Round COUNT columns, and move the error of each to those after it; a program has ROWS rows of one matrix.

    All pointers are to the first of these columns.

    Args:
        left: float32 ``[matrices, rows, width]``; only read: of these columns no one needs what is left.
        scale: float32, what each code is multiplied by; the same shape.
        factor: float32 ``[matrices, width, width]``, upper: the inverse Hessian's Cholesky factor.
        codes: uint8 ``[matrices, rows, width]``, filled in these columns.
        errors: float32 ``[matrices, rows, ERROR_COLUMNS]``, filled: what each column left over, in units of the diagonal.
    """
    matrix = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < COUNT)[None, :]
    places = matrix * rows * width + row[:, None].to(tl.int64) * width + column[None, :]
    block = tl.load(left + places, mask=inside, other=0.0)
    units = scale + matrix * rows * width + row.to(tl.int64) * width
    factors = factor + matrix * width * width
    made = tl.zeros((ROWS, COLUMNS), tl.int32)
    over = tl.zeros((ROWS, COLUMNS), tl.float32)
    for number in range(COUNT):
        here = (column == number)[None, :]
        # Picked out as bits: a sum of floats would lose the sign of zero.
        value = tl.sum(tl.where(here, block.to(tl.int32, bitcast=True), 0), axis=1).to(tl.float32, bitcast=True)
        unit = tl.load(units + number, mask=row < rows, other=1.0)
        wanted = tl.div_rn(value, unit)
        size = tl.abs(wanted)
        # Ties go to the even code: an upper bound that belongs to the code below it, or not.
        code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
        code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
        code += (size > 5.0).to(tl.int32)
        magnitude = tl.where(code < 4, code * 0.5, tl.where(code < 6, code * 1.0 - 2.0, code * 2.0 - 8.0))
        negative = wanted.to(tl.int32, bitcast=True) < 0
        rounded = tl.where(negative, -magnitude, magnitude)
        diagonal = tl.load(factors + number * width + number)
        error = tl.div_rn(value - rounded * unit, diagonal)
        later = (column > number) & (column < COUNT)
        spread = tl.load(factors + number * width + column, mask=later, other=0.0)
        block -= spread[None, :] * error[:, None]
        made = tl.where(here, (code + tl.where(negative, 8, 0))[:, None], made)
        over = tl.where(here, error[:, None], over)
    tl.store(codes + places, made.to(tl.uint8), mask=inside)
    rest = errors + (matrix * rows + row[:, None]) * ERROR_COLUMNS + column[None, :]
    tl.store(rest, over, mask=inside)
