"""GPTQ's inner loop, compiled: one row after another, since rows do not depend on each other."""

# Numba infers these types itself, and its decorators hide them from a checker.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

f32 = np.float32


@njit(nogil=True, error_model="numpy", cache=True)
def round_columns(block, scale, factor, codes, errors):
    """Round a block of columns, and move the error of each to those after it.

    Args:
        block: float32 ``[rows, columns]``; changed.
        scale: float32, what each code is multiplied by; the same shape.
        factor: float32 ``[columns, columns]``, upper: the inverse Hessian's Cholesky factor.
        codes: uint8, filled; the same shape as `block`.
        errors: float32, filled: what each column left over, in units of the factor's diagonal.
    """
    rows, columns = block.shape
    for row in range(rows):
        for column in range(columns):
            value, unit = block[row, column], scale[row, column]
            wanted = value / unit
            size = abs(wanted)
            # Ties go to the even code: an upper bound that belongs to the code below it, or not.
            if size <= f32(0.25):
                code, rounded = 0, f32(0.0)
            elif size < f32(0.75):
                code, rounded = 1, f32(0.5)
            elif size <= f32(1.25):
                code, rounded = 2, f32(1.0)
            elif size < f32(1.75):
                code, rounded = 3, f32(1.5)
            elif size <= f32(2.5):
                code, rounded = 4, f32(2.0)
            elif size < f32(3.5):
                code, rounded = 5, f32(3.0)
            elif size <= f32(5.0):
                code, rounded = 6, f32(4.0)
            else:
                code, rounded = 7, f32(6.0)
            if np.signbit(wanted):
                code, rounded = code + 8, -rounded
            error = (value - rounded * unit) / factor[column, column]
            codes[row, column] = code
            errors[row, column] = error
            for later in range(column + 1, columns):
                block[row, later] -= factor[column, later] * error
