"""The record of a quantization, kept in the artifact as omnifp4.json."""

from __future__ import annotations

from typing import Any

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.plan import ComponentRow


class SourceRecord(Record):
    """Which checkpoint was quantized.

    Attributes:
        model: folder name or Hub id, never a path.
        revision: commit of a Hub id; empty for a local folder.
        model_type: of its config.
        headers_sha256: of config.json and every shard's header, sizes included: names, shapes and order of all tensors.
        weight_bytes: of all shard files.
    """

    model: str
    revision: str = ""
    model_type: str
    headers_sha256: str
    weight_bytes: int


class ComponentError(Record):
    """How far the FP4 linears of a component are from their originals, all together.

    Attributes:
        relative_squared_error: ``sum((w - w')**2) / sum(w**2)`` over the component.
        worst_tensor: the linear with the largest relative squared error.
        worst_relative_squared_error: of that one.
    """

    linears: int
    relative_squared_error: float
    worst_tensor: str
    worst_relative_squared_error: float


class QuantizationReceipt(Record):
    """The record of ``omnifp4 quantize``.

    Attributes:
        left_out: linears of a quantized component that stay wide, with the reason.
        decisions: for each FP4 linear its relative squared error, by checkpoint name of the wide weight.
        tensors: CRC-32 of the bytes of every stored tensor, by name.
        peak_memory_bytes: largest resident size of the process.
        changes: receipts of later conversions and repairs of this artifact, in order.
        seconds: of the last run; a resumed job is not summed up.
        resumed_units: units of work that an earlier run had finished.
    """

    receipt: str = "quantization"
    version: int = RECEIPT_VERSION
    source: SourceRecord
    recipe: str
    recipe_version: int
    rule: str
    overrides: dict[str, str]
    output_format: str
    components: tuple[ComponentRow, ...]
    errors: dict[str, ComponentError]
    relative_squared_error: float
    parameters: int
    fp4_parameters: int
    weight_bytes: int
    shards: dict[str, int]
    ignore: tuple[str, ...]
    left_out: dict[str, str]
    decisions: dict[str, float]
    tensors: dict[str, int]
    backend: str
    backend_reason: str
    threads: int
    seconds: float
    resumed_units: int
    peak_memory_bytes: int
    changes: tuple[dict[str, Any], ...] = ()
    environment: Environment
