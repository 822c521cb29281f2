"""The NVFP4 number format: what it is, a plain reference, and fast twins.

Importing this package imports numpy alone; numba, torch and triton come with the backend that needs them.
"""

from omnifp4.formats.backend import BACKENDS, Backend, choose_backend, encode
from omnifp4.formats.nvfp4 import BLOCK_SIZE, EncodeStats, NVFP4Tensor, ScaleRule, pack, unpack
from omnifp4.formats.reference import decode, relative_squared_error, tensor_scale_for

__all__ = [
    "BACKENDS",
    "BLOCK_SIZE",
    "Backend",
    "EncodeStats",
    "NVFP4Tensor",
    "ScaleRule",
    "choose_backend",
    "decode",
    "encode",
    "pack",
    "relative_squared_error",
    "tensor_scale_for",
    "unpack",
]
