"""The record of a plan: what would happen, from headers alone."""

from __future__ import annotations

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record


class ComponentRow(Record):
    """One component before and after.

    Attributes:
        name: as ``--component`` takes it.
        scheme: ``nvfp4``, ``mxfp4``, ``fp8``, ``int8`` or ``bf16`` (left as it is).
        tensors: logical tensors.
        parameters: of all its tensors.
        fp4_parameters: of those that become NVFP4 or MXFP4.
        quantized_parameters: of those that become anything but what they are.
        bytes_before: as it stands.
        bytes_after: as it would be stored, scales included.
        reason: why it, or what is left of it, stays wide.
    """

    name: str
    scheme: str
    tensors: int
    parameters: int
    fp4_parameters: int
    quantized_parameters: int = 0
    bytes_before: int
    bytes_after: int
    reason: str


class PlanReceipt(Record):
    """The record of ``omnifp4 plan``.

    Attributes:
        weight_bytes_before: of all shard files.
        weight_bytes_after: of all shard files to be written, headers included: exactly what ``quantize`` writes.
        gpu_bytes: tensor bytes an engine that keeps the codes packed holds for the weights.
        side_file_bytes: of the files that go along; None where only headers are at hand.
        free_disk_bytes: where OUT would be; None if no OUT was named.
        fp4_share: FP4 parameters over all parameters.
        left_out: linears of a quantized component that stay wide, with the reason.
    """

    receipt: str = "plan"
    version: int = RECEIPT_VERSION
    model: str
    model_type: str
    recipe: str
    recipe_version: int
    rule: str
    overrides: dict[str, str]
    output_format: str
    components: tuple[ComponentRow, ...]
    tensors: int
    parameters: int
    fp4_parameters: int
    fp4_share: float
    weight_bytes_before: int
    weight_bytes_after: int
    gpu_bytes: int
    shards: dict[str, int]
    side_file_bytes: int | None
    free_disk_bytes: int | None
    left_out: dict[str, str]
    notes: tuple[str, ...]
    environment: Environment
