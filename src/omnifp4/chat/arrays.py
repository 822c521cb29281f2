"""What a person hands over in place of a file: lists and arrays of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from omnifp4.chat.errors import MediaError


def as_array(value: Any, kind: str, where: str) -> np.ndarray[Any, np.dtype[Any]]:
    """`value` as NumPy has it.

    Args:
        value: an array, a tensor on the host, or lists of numbers within each other.
        kind: ``image`` or ``audio``.
        where: for errors.

    Raises:
        MediaError: the lists are of different lengths.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise MediaError(
            f"{where}: a value of type {type(value).__name__} is no {kind}: {str(error)[:200]}",
            hint="allowed: a path, a data URL, bytes, an array",
        ) from error
