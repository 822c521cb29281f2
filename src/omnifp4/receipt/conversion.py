"""The record of a conversion from one dialect to the other, appended to the artifact's omnifp4.json."""

from __future__ import annotations

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record


class ConversionReceipt(Record):
    """The record of ``omnifp4 convert``.

    Codes and block scales are the same bytes as before. A tensor scale that one dialect stores as a factor and the
    other as a divisor is exact for powers of two; any other is chosen so that decoded BF16 weights stay equal.

    Attributes:
        artifact: folder name of what was converted, never a path.
        headers_sha256: of its config and headers.
        from_format: dialect that was read.
        to_format: dialect that was written.
        activations: ``W4A16`` or ``W4A4``.
        fp4_linears: linears whose codes and block scales were copied.
        exact_tensor_scales: of them, those whose tensor scale is a power of two.
        nudged_tensor_scales: those that got a neighbour of the nearest reciprocal so that weights decode alike.
        rounding_differs: for each linear where no such neighbour exists, how many of its weights decode to the
            neighbouring BF16 number.
        ignore: entries of the new config.
        notes: what a person may want to know.
        weight_bytes: of all shard files written.
        shards: bytes of each shard file.
        tensors: CRC-32 of the bytes of every stored tensor, by name.
        resumed_units: units of work that an earlier run had finished.
        seconds: of the last run.
    """

    receipt: str = "conversion"
    version: int = RECEIPT_VERSION
    artifact: str
    headers_sha256: str
    model_type: str
    from_format: str
    to_format: str
    activations: str
    fp4_linears: int
    exact_tensor_scales: int
    nudged_tensor_scales: int
    rounding_differs: dict[str, int]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]
    weight_bytes: int
    shards: dict[str, int]
    tensors: dict[str, int]
    resumed_units: int
    seconds: float
    environment: Environment
