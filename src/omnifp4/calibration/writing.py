"""Writes a statistics file from what each finished layer left, so that a killed run loses one layer at most."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.calibration.statistics import (
    DIGEST_KEY,
    DTYPES,
    INDEX_KEY,
    RECEIPT_KEY,
    header_digest,
    open_statistics,
)
from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.header import build_header
from omnifp4.checkpoint.staging import Staging, refuse_existing, sync_folder
from omnifp4.errors import OutputError
from omnifp4.receipt.calibration import CalibrationReceipt

NAMES: Final = {"torch.int64": "I64", "torch.float32": "F32"}
COPY_BYTES: Final = 1 << 24


def write_part(staging: Staging, unit: str, tensors: Mapping[str, Tensor], more: Mapping[str, Any]) -> None:
    """Write the tensors of one unit of work, and remember it as done with what else is to be known of it."""
    entries: dict[str, Any] = {}
    path = staging.folder / _file(unit)
    try:
        with path.open("wb") as file:
            for name in sorted(tensors):
                value = tensors[name].contiguous()
                data = value.numpy().tobytes()
                file.write(data)
                entries[name] = [NAMES[str(value.dtype)], list(value.shape), zlib.crc32(data)]
            file.flush()
            os.fsync(file.fileno())
        staging.record(unit, {"tensors": entries, **more})
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}", hint="free some space, then --resume"
        ) from None


def read_part(staging: Staging, unit: str) -> dict[str, Tensor]:
    """The tensors of one unit of work.

    Raises:
        OutputError: they are not what was written, or not there.
    """
    path, found, begin = staging.folder / _file(unit), {}, 0
    hint = f"remove {staging.folder} and start again"
    try:
        data = bytearray(path.read_bytes())
        for name, (kind, shape, crc) in sorted(staging.finished[unit]["tensors"].items()):
            size = byte_count(kind, tuple(shape))
            piece = data[begin : begin + size]
            if len(piece) != size or zlib.crc32(piece) != crc:
                raise OutputError(f"{path}: tensor {name!r} is not what was written", hint=hint)
            found[name] = torch.frombuffer(piece, dtype=DTYPES[kind]).view(shape) if size else torch.zeros(shape)
            begin += size
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}", hint=hint) from None
    except (KeyError, TypeError, ValueError):
        raise OutputError(f"{path}: the journal tells of it what cannot be", hint=hint) from None
    return found


def checksums(staging: Staging, units: Sequence[str]) -> dict[str, int]:
    """CRC-32 of all tensors of these units."""
    return {name: entry[2] for unit in units for name, entry in staging.finished[unit]["tensors"].items()}


def assemble(
    staging: Staging,
    units: list[str],
    receipt: CalibrationReceipt,
    weights: Mapping[str, str],
    experts: Mapping[str, int],
) -> None:
    """Make the statistics file of its parts, and remove the folder of parts.

    Raises:
        OmniFP4Error: the file came into being meanwhile, a part is missing or damaged, or the disk is full.
    """
    tensors = [
        (name, str(entry[0]), tuple(entry[1]))
        for unit in units
        for name, entry in sorted(staging.finished[unit]["tensors"].items())
    ]
    index = json.dumps({"weights": dict(weights), "experts": dict(experts)}, separators=(",", ":"))
    metadata = {RECEIPT_KEY: receipt.model_dump_json(), INDEX_KEY: index}
    header, _ = build_header(tensors, metadata | {DIGEST_KEY: header_digest(metadata, tensors)})
    whole = staging.folder / "statistics.safetensors"
    try:
        with whole.open("wb") as file:
            file.write(header)
            for unit in units:
                with (staging.folder / _file(unit)).open("rb") as part:
                    shutil.copyfileobj(part, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        open_statistics(whole).close()
        refuse_existing(staging.out)
        whole.rename(staging.out)
        sync_folder(staging.out.absolute().parent)
    except OSError as error:
        raise OutputError(f"{staging.out}: cannot be written: {error.strerror}") from None
    shutil.rmtree(staging.folder)


def _file(unit: str) -> str:
    return f"{unit.replace(' ', '-')}.bin"
