"""The statistics file: what was seen of the inputs of every linear, found under the checkpoint name of its weight.

One safetensors file. A bank is the statistics of one input, or of one input of all experts of a layer: tensors
``{bank}.{source}.{field}`` whose first dimension counts rows, one for a plain linear, one an expert for experts. Weights
that read the same input (q, k and v; gate and up) share a bank. ``__metadata__`` holds the receipt, and which weight
reads which bank, and a digest of these and of all tensors' types and shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from omnifp4.calibration.fingerprint import model_fingerprint
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.checkpoint.header import LENGTH_BYTES, TensorEntry, header_length, parse_header
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.receipt.calibration import STATISTICS_VERSION, CalibrationReceipt

Source = Literal["routed", "all-expert", "none"]
"""Where an input's statistics come from: the tokens that the router sent there (of a plain linear: all tokens), a sample
of all tokens, or nowhere."""

ROUTED: Final = "routed"
ALL_EXPERT: Final = "all-expert"
NONE: Final = "none"

FIELDS: Final = ("tokens", "amax", "abs_mean", "square_mean", "block_hessian")
DTYPES: Final = {"I64": torch.int64, "F32": torch.float32}
BLOCK: Final = 16
"""Inputs of a block of the block Hessian: NVFP4's."""

RECEIPT_KEY: Final = "omnifp4"
INDEX_KEY: Final = "index"
DIGEST_KEY: Final = "sha256"
EXPERT_WEIGHT: Final = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight"
)
CHUNK_BYTES: Final = 1 << 24


@dataclass(frozen=True)
class InputStatistics:
    """Of the input of one linear, or of one routed expert's gate and up (shared) or down.

    Attributes:
        tokens: that it saw; of an expert, those that were sent to it.
        amax: float32 ``[]``, the largest magnitude.
        abs_mean: float32 ``[in]``, E|x|.
        square_mean: float32 ``[in]``, E[x²].
        block_hessian: float32 ``[in/16, 16, 16]``, E[x x'] of each block of 16 inputs; None if it was not collected, or
            if the width is no multiple of 16.
        source: ``routed`` or ``all-expert``.
    """

    tokens: int
    amax: Tensor
    abs_mean: Tensor
    square_mean: Tensor
    block_hessian: Tensor | None
    source: Source = ROUTED


@dataclass(frozen=True)
class GradientStatistics:
    """Squared gradients of one weight, in two factors: ``rows[o] * columns[i] / rows.sum()`` stands for that of weight
    ``[o, i]``, per position of the answers; see `omnifp4.segments.gradients.run_gradients`.

    Attributes:
        rows: float32 ``[out]``.
        columns: float32 ``[in]``.
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, slots=True)
class _Row:
    """Where one weight's statistics are."""

    bank: str
    row: int
    of_expert: bool


class Statistics:
    """An open statistics file; reads what is asked for. Close it, or use it in a ``with``.

    Attributes:
        path: of the file.
        receipt: how it was made.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        entries: Mapping[str, TensorEntry],
        receipt: CalibrationReceipt,
        index: _Index,
    ) -> None:
        """See `open_statistics`."""
        self.path, self.receipt = path, receipt
        self._descriptor, self._entries, self._index = descriptor, entries, index

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def names(self) -> tuple[str, ...]:
        """Checkpoint names of all weights with statistics, experts that saw too few left out."""
        return tuple(name for name in self._all_names() if name in self)

    def __contains__(self, weight_name: object) -> bool:
        return isinstance(weight_name, str) and self.source(weight_name) != NONE

    def source(self, weight_name: str) -> Source:
        """Where the statistics of a weight's input come from; ``none`` if the file has none."""
        row = self._row(weight_name)
        if row is None:
            return NONE
        if self._tokens(row, ROUTED) >= self._least(row):
            return ROUTED
        return ALL_EXPERT if self._tokens(row, ALL_EXPERT) >= self._least(row) else NONE

    def tokens(self, weight_name: str) -> int:
        """Tokens that were sent to a weight, however few; 0 for a weight that the file does not know."""
        row = self._row(weight_name)
        return 0 if row is None else self._tokens(row, ROUTED)

    def of(self, weight_name: str) -> InputStatistics:
        """Statistics of the input of one weight.

        Args:
            weight_name: checkpoint name of the logical weight, such as
                ``thinker.model.layers.0.mlp.experts.7.down_proj.weight``.

        Raises:
            OmniFP4Error: there are none; `source` tells before.
        """
        row, source = self._row(weight_name), self.source(weight_name)
        if row is None or source == NONE:
            told = "is in no bank" if row is None else f"saw {self._tokens(row, ROUTED)} tokens"
            raise OmniFP4Error(
                f"{self.path}: no statistics of {weight_name!r}: it {told}",
                hint="take the data-free rule for it, or calibrate with more data",
            )
        found: dict[str, Any] = {
            field: self._read(row, source, field) for field in FIELDS if self._name(row, source, field) in self._entries
        }
        tokens = int(found.pop("tokens"))
        return InputStatistics(tokens=tokens, source=source, block_hessian=found.pop("block_hessian", None), **found)

    def gradient(self, weight_name: str) -> GradientStatistics:
        """Squared gradients of one weight, zero for an expert that no token came to.

        Raises:
            OmniFP4Error: the file has none of this weight.
        """
        match = EXPERT_WEIGHT.fullmatch(weight_name)
        number = int(match["number"]) if match else 0
        module = f"{match['experts']}.{match['part']}" if match else weight_name.removesuffix(".weight")
        entries = [self._entries.get(name) for name in gradient_names(module)]
        rows, columns = (self._read_row(entry, number) if entry is not None else None for entry in entries)
        if rows is None or columns is None or not self.receipt.gradient_positions:
            raise OmniFP4Error(
                f"{self.path}: no gradients of {weight_name!r}",
                hint="omnifp4 calibrate MODEL FILE --gradients collects them, of the thinker's layers only",
            )
        return GradientStatistics(rows / self.receipt.gradient_positions, columns / self.receipt.gradient_positions)

    def _all_names(self) -> Iterator[str]:
        yield from self._index.weights
        for experts, count in self._index.experts.items():
            for number in range(count):
                for part in ("gate_proj", "up_proj", "down_proj"):
                    yield f"{experts}.{number}.{part}.weight"

    def _row(self, weight_name: str) -> _Row | None:
        if bank := self._index.weights.get(weight_name):
            return _Row(bank, 0, False)
        match = EXPERT_WEIGHT.fullmatch(weight_name)
        if match is None or int(match["number"]) >= self._index.experts.get(match["experts"], 0):
            return None
        return _Row(expert_bank(match["experts"], match["part"]), int(match["number"]), True)

    def _least(self, row: _Row) -> int:
        """A plain linear sees every token, so that one is enough to know it was reached."""
        return self.receipt.least_tokens if row.of_expert else 1

    @cached_property
    def _token_counts(self) -> dict[str, Tensor]:
        return {name: self._tensor(entry) for name, entry in self._entries.items() if name.endswith(".tokens")}

    def _tokens(self, row: _Row, source: Source) -> int:
        counts = self._token_counts.get(self._name(row, source, "tokens"))
        return 0 if counts is None else int(counts[min(row.row, len(counts) - 1)])

    def _name(self, row: _Row, source: Source, field: str) -> str:
        return f"{row.bank}.{source}.{field}"

    def _read(self, row: _Row, source: Source, field: str) -> Tensor:
        entry = self._entries[self._name(row, source, field)]
        # Statistics of all tokens have one row where all experts read the same input.
        return self._read_row(entry, min(row.row, entry.shape[0] - 1))

    def _read_row(self, entry: TensorEntry, number: int) -> Tensor:
        size = entry.nbytes // entry.shape[0]
        raw = torch.empty(size, dtype=torch.uint8)
        _read_into(self._descriptor, raw.numpy().data, entry.begin + number * size, self.path)
        return raw.view(DTYPES[entry.dtype]).view(entry.shape[1:])

    def _tensor(self, entry: TensorEntry) -> Tensor:
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        _read_into(self._descriptor, raw.numpy().data, entry.begin, self.path)
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True, slots=True)
class _Index:
    """Which weight reads which bank, and how many experts each group has."""

    weights: Mapping[str, str]
    experts: Mapping[str, int]


def gradient_names(module: str) -> tuple[str, str]:
    """Tensors of a weight's squared gradients: by output, by input.

    Args:
        module: of a plain linear; of experts ``….mlp.experts.gate_proj`` and so on, all of them in one.
    """
    return f"{module}.gradient.rows", f"{module}.gradient.columns"


def expert_bank(experts: str, part: str) -> str:
    """The bank of an expert's projection: gate and up read the same."""
    return f"{experts}.down" if part == "down_proj" else f"{experts}.gate_up"


def open_statistics(path: str | Path, model: Checkpoint | str | Path | None = None) -> Statistics:
    """Open a statistics file; every byte is checked.

    Args:
        path: what ``omnifp4 calibrate`` wrote.
        model: the wide checkpoint that it is to be used for, if that shall be checked too.

    Raises:
        OmniFP4Error: missing, damaged, of another version, or of another model.
    """
    path = Path(path)
    hint = "omnifp4 calibrate MODEL STATISTICS --data SET makes one"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise OmniFP4Error(f"{path}: cannot be opened: {error.strerror}", hint=hint) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OmniFP4Error(f"{path}: is no file", hint=hint)
        entries, metadata = _header(descriptor, path)
        if RECEIPT_KEY not in metadata or INDEX_KEY not in metadata:
            raise OmniFP4Error(f"{path}: is no statistics file: it lacks the receipt of one", hint=hint)
        receipt, index = _receipt(metadata[RECEIPT_KEY], path), _index(metadata[INDEX_KEY], path)
        _check_tensors(entries, receipt, index, path)
        tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries.values()]
        if metadata.get(DIGEST_KEY) != header_digest(metadata, tensors):
            raise OmniFP4Error(f"{path}: damaged: its header is not what was written", hint=hint)
        for entry in entries.values():
            if _crc(descriptor, entry, path) != receipt.tensors[entry.name]:
                raise OmniFP4Error(f"{path}: damaged: tensor {entry.name!r} is not what was written", hint=hint)
        if model is not None:
            _check_model(receipt, model if isinstance(model, Checkpoint) else open_checkpoint(model), path)
    except CheckpointError as error:
        os.close(descriptor)
        raise OmniFP4Error(f"{error}: damaged, or no statistics file", hint=hint) from None
    except BaseException:
        os.close(descriptor)
        raise
    return Statistics(path, descriptor, entries, receipt, index)


def header_digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """SHA-256 of what the header says: receipt, index, and the tensors' names, types and shapes."""
    lines = [metadata[RECEIPT_KEY], metadata[INDEX_KEY]]
    lines += sorted(f"{name}|{dtype}|{shape}" for name, dtype, shape in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _header(descriptor: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    size = os.fstat(descriptor).st_size
    length = header_length(os.pread(descriptor, LENGTH_BYTES, 0), size, str(path))
    raw = bytearray(length)
    _read_into(descriptor, memoryview(raw), LENGTH_BYTES, path)
    entries, metadata = parse_header(bytes(raw), path.name, size, str(path))
    return {entry.name: entry for entry in entries}, metadata


def _receipt(text: str, path: Path) -> CalibrationReceipt:
    try:
        value = json.loads(text)
        version = value.get("statistics_version") if isinstance(value, dict) else None
        if version != STATISTICS_VERSION:
            raise OmniFP4Error(
                f"{path}: statistics of version {version!r}; this omnifp4 reads {STATISTICS_VERSION}",
                hint="calibrate again",
            )
        return CalibrationReceipt.model_validate(value)
    except (ValueError, ValidationError):
        raise OmniFP4Error(f"{path}: damaged: its receipt cannot be read", hint="calibrate again") from None


def _index(text: str, path: Path) -> _Index:
    try:
        value = json.loads(text)
        weights = {str(name): str(bank) for name, bank in value["weights"].items()}
        return _Index(weights, {str(name): int(count) for name, count in value["experts"].items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise OmniFP4Error(f"{path}: damaged: its index cannot be read", hint="calibrate again") from None


def _check_tensors(entries: Mapping[str, TensorEntry], receipt: CalibrationReceipt, index: _Index, path: Path) -> None:
    rows = dict.fromkeys(index.weights.values(), 1)
    rows |= {expert_bank(name, part): n for name, n in index.experts.items() for part in ("gate_proj", "down_proj")}
    wanted = {f"{bank}.{ROUTED}.{field}": count for bank, count in rows.items() for field in FIELDS[:-1]}
    for name, count in wanted.items():
        if name not in entries or entries[name].shape[:1] != (count,):
            raise OmniFP4Error(
                f"{path}: damaged: tensor {name!r} is missing or of a wrong shape", hint="calibrate again"
            )
    for name, entry in entries.items():
        if entry.dtype not in DTYPES or not entry.shape or name not in receipt.tensors:
            raise OmniFP4Error(f"{path}: damaged: tensor {name!r} is not of a statistics file", hint="calibrate again")


def _check_model(receipt: CalibrationReceipt, checkpoint: Checkpoint, path: Path) -> None:
    if receipt.model_fingerprint != model_fingerprint(checkpoint):
        raise OmniFP4Error(
            f"{path}: statistics of another model ({receipt.model}, {receipt.model_type}), not of {checkpoint.location}",
            hint=f"omnifp4 calibrate {checkpoint.location} STATISTICS --data SET",
        )


def _crc(descriptor: int, entry: TensorEntry, path: Path) -> int:
    crc, buffer = 0, bytearray(min(entry.nbytes, CHUNK_BYTES))
    for begin in range(entry.begin, entry.end, CHUNK_BYTES):
        view = memoryview(buffer)[: min(CHUNK_BYTES, entry.end - begin)]
        _read_into(descriptor, view, begin, path)
        crc = zlib.crc32(view, crc)
    return crc


def _read_into(descriptor: int, view: memoryview, position: int, path: Path) -> None:
    view = view.cast("B")
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise OmniFP4Error(f"{path}: damaged: it ends too early", hint="calibrate again")
        view, position = view[count:], position + count
