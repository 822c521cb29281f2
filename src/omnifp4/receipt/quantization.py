"""The record of a quantization, kept in the artifact as omnifp4.json."""

from __future__ import annotations

from typing import Any

from pydantic import Field

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


class OutputError(Record):
    """How far the outputs of a component's linears are from those of the wide ones, on the calibration inputs.

    All are shares of the outputs' energy, ``sum |(W - W') x|**2 / sum |W x|**2``, each linear weighed by its tokens.

    Attributes:
        linears: that something was known of.
        error: as written.
        data_free: if the same weights had been rounded by the data-free rule.
    """

    linears: int
    error: float
    data_free: float


class CalibrationUse(Record):
    """What a calibrated recipe looked at, and what it gave.

    Attributes:
        method: settings of the recipe's method.
        weighting: of errors between scales.
        activations: ``W4A16`` or ``W4A4``.
        data, data_sha256: of the calibration set.
        samples, tokens: that were run.
        sources: how many linears used inputs that were routed to them, inputs of all experts, or none.
        data_free: first of the linears that nothing was known of.
        folds: channels sets that factors were folded into.
        fold_places: where it was tried.
        more_damped: linears whose Hessian needed more damping than the recipe's.
        not_inverted: linears whose Hessian no damping made invertible: they were rounded to the nearest.
        sibling_scales: experts that take the largest input scale of their siblings.
        outputs: by component.
        learned_together: linears whose rounding was learned with the rest of their layer.
        sensitivity_sha256: of the map that a budget chose by; empty where there was none.
    """

    method: dict[str, Any]
    weighting: str
    activations: str
    data: str
    data_sha256: str
    samples: int
    tokens: int
    sources: dict[str, int]
    data_free: tuple[str, ...]
    folds: int
    fold_places: int
    more_damped: int
    not_inverted: int
    sibling_scales: int
    outputs: dict[str, OutputError]
    learned_together: int = 0
    sensitivity_sha256: str = ""


class QuantizationReceipt(Record):
    """The record of ``omnifp4 quantize``.

    Attributes:
        left_out: linears of a quantized component that stay wide, with the reason.
        decisions: for each quantized linear its relative squared error, by checkpoint name of the wide weight.
        schemes: of each quantized linear that is not NVFP4, by the same name.
        tensors: CRC-32 of the bytes of every stored tensor, by name.
        calibration: what was known of the inputs; None for a recipe that looks at none.
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
    schemes: dict[str, str] = Field(default_factory=dict)
    tensors: dict[str, int]
    calibration: CalibrationUse | None = None
    backend: str
    backend_reason: str
    threads: int
    seconds: float
    resumed_units: int
    peak_memory_bytes: int
    changes: tuple[dict[str, Any], ...] = ()
    environment: Environment
