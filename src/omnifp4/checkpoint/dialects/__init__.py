"""The ways in which tools and engines write quantized checkpoints to disk."""

from __future__ import annotations

from typing import Final

from omnifp4.checkpoint.dialects.base import Activations, Dialect, LinearEntries, QuantizationClaim
from omnifp4.checkpoint.dialects.coded import CodedForm, CodedLinear, StoredTensor, find_coded
from omnifp4.checkpoint.dialects.compressed_tensors import CompressedTensors
from omnifp4.checkpoint.dialects.modelopt import ModelOpt

MODELOPT: Final = ModelOpt()
COMPRESSED_TENSORS: Final = CompressedTensors()
DIALECTS: Final[dict[str, Dialect]] = {dialect.name: dialect for dialect in (MODELOPT, COMPRESSED_TENSORS)}

__all__ = [
    "COMPRESSED_TENSORS",
    "DIALECTS",
    "MODELOPT",
    "Activations",
    "CodedForm",
    "CodedLinear",
    "CompressedTensors",
    "Dialect",
    "LinearEntries",
    "ModelOpt",
    "QuantizationClaim",
    "StoredTensor",
    "find_coded",
]
