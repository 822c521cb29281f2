"""What an artifact's weights are stored in, in words."""

from __future__ import annotations

from omnifp4.receipt.gathered import GatheredReceipt
from omnifp4.receipt.plan import PlanReceipt
from omnifp4.receipt.quantization import QuantizationReceipt

USUAL = "NVFP4"
"""Where no receipt tells the schemes."""
WIDE = "bf16"


def scheme_names(source: QuantizationReceipt | PlanReceipt | None) -> str:
    """Every scheme but the wide one, such as ``NVFP4`` or ``NVFP4 and FP8``."""
    if source is None:
        return USUAL
    found = dict.fromkeys(row.scheme for row in source.components if row.scheme != WIDE)
    if isinstance(source, QuantizationReceipt):
        found |= dict.fromkeys(source.schemes.values())
    return " and ".join(name.upper() for name in found) or "BF16"


def quantized_parameters(source: QuantizationReceipt | PlanReceipt) -> int:
    """Parameters that are stored in one of them."""
    return sum(max(row.quantized_parameters, row.fp4_parameters) for row in source.components)


def headline(receipt: GatheredReceipt) -> str:
    """What a report is about."""
    return f"{receipt.model} in {scheme_names(receipt.quantization or receipt.plan)}"
