"""Tensors that are missing, unknown, or wide and damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from omnifp4.checkpoint.dialects import DIALECTS
from omnifp4.checkpoint.dtypes import NUMPY_DTYPES, WIDE_FLOATS
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.artifact import LEFTOVER_SUFFIXES, Artifact
from omnifp4.conversion.judge_coverage import is_readable
from omnifp4.conversion.ledger import Ledger
from omnifp4.conversion.original import Original
from omnifp4.conversion.patient import Patient, Treatment
from omnifp4.formats import fast_cpu
from omnifp4.models.base import TensorSpec
from omnifp4.models.source import SourceTensor
from omnifp4.receipt.repair import Effect

CHUNK_BYTES = 8 << 20

PART_SUFFIXES = tuple(
    suffix
    for dialect in DIALECTS.values()
    for suffix in (
        dialect.block_scale_suffix,
        dialect.tensor_scale_suffix,
        dialect.input_scale_suffix,
        ".weight_packed",
    )
)


def judge_unreadable(
    patient: Patient, unreadable: Mapping[str, str], weight_map: Mapping[str, str], missing: list[str]
) -> None:
    """Shards that cannot be read: they matter if something is missing without them."""
    for shard, reason in unreadable.items():
        if not missing and shard not in weight_map.values():
            patient.ledger.mend(
                "shard.unreadable", shard, f"it cannot be read ({reason})", "left out: nothing needs it"
            )
        elif patient.original is not None:
            action = "left out; what was in it is made again from the original"
            patient.ledger.mend("shard.unreadable", shard, f"it cannot be read ({reason})", action, Effect.RECOMPUTED)
        else:
            patient.ledger.fail("shard.unreadable", shard, f"it cannot be read ({reason})")


def judge_leftovers(artifact: Artifact, treatment: Treatment, ledger: Ledger) -> None:
    """Tensors that no loader reads, and tensors that have no place in the model."""
    for name in artifact.unknown():
        module = next((name.removesuffix(suffix) for suffix in PART_SUFFIXES if name.endswith(suffix)), "")
        if module in artifact.specs:
            treatment.dropped.add(name)
            if f"{module}.weight" in artifact.checkpoint.tensors:
                ledger.mend("tensor.leftover", name, "it belongs to a linear that is not in NVFP4", "left out")
        elif name.endswith(LEFTOVER_SUFFIXES):
            treatment.dropped.add(name)
            ledger.mend("tensor.leftover", name, "a quantizer left it and no loader reads it", "left out")
        else:
            problem = f"it has no place in a {artifact.layout.model_type} of this config"
            ledger.fail("tensor.unknown", name, problem, "the config that belongs to these weights, or other weights")


def judge_missing(patient: Patient, treatment: Treatment, weight_map: Mapping[str, str]) -> list[TensorSpec]:
    """Tensors that the config calls for and no shard has.

    Returns:
        The missing linears that should be in NVFP4; the other missing tensors are dealt with.
    """
    artifact, lost = patient.artifact, []
    for name in artifact.layout.missing(artifact.logical_names):
        spec = artifact.layout.by_name[name]
        if spec.is_linear and should_be_fp4(artifact, spec, weight_map):
            lost.append(spec)
        elif patient.original is not None and (found := patient.original.find(name)) is not None:
            treatment.fetched[name] = found
            patient.ledger.mend("tensor.missing", name, "it is missing", "copied from the original", Effect.RESTORED)
        else:
            patient.ledger.fail("tensor.missing", name, "it is missing")
    return lost


def should_be_fp4(artifact: Artifact, spec: TensorSpec, weight_map: Mapping[str, str]) -> bool:
    """Whether a missing linear was in NVFP4: parts of it are left, the index names some, or its like are."""
    parts = {spec.module + suffix for suffix in PART_SUFFIXES}
    if is_readable(spec) and not (parts.isdisjoint(artifact.checkpoint.tensors) and parts.isdisjoint(weight_map)):
        return True
    if spec.name in weight_map:
        return False
    like = [s for s in artifact.specs.values() if s.component is spec.component or s.component == spec.component]
    fp4 = sum(s.module in artifact.linears for s in like)
    wide = sum(s.name in artifact.checkpoint.tensors and s.module not in artifact.linears for s in like)
    return fp4 > wide


def judge_wide(patient: Patient, treatment: Treatment) -> None:
    """Wide tensors: type, shape, finite values, checksums; or simply equality with the original."""
    artifact, ledger = patient.artifact, patient.ledger
    replaced = {f"{module}.weight" for module in treatment.encoded_modules} | treatment.dropped | artifact.parts
    for name, entry in artifact.checkpoint.tensors.items():
        spec = artifact.layout.by_name.get(name)
        if name in replaced:
            continue
        found = _find_wide(patient.original, name) if patient.original else None
        if patient.original is not None and found is not None:
            if problem := _difference(patient.reader, patient.original, entry, found):
                treatment.fetched[name] = found
                ledger.mend("wide.differs", name, problem, "copied from the original", Effect.RESTORED)
            continue
        if spec is not None and entry.shape != spec.shape:
            ledger.fail("wide.shape", name, f"it is {list(entry.shape)} where the config makes it {list(spec.shape)}")
        elif spec is not None and spec.is_linear and entry.dtype not in WIDE_FLOATS:
            ledger.fail("wide.dtype", name, f"it is {entry.dtype}, neither NVFP4 nor wide")
        elif (index := _first_nonfinite(patient.reader, entry)) >= 0:
            ledger.fail("wide.nonfinite", name, f"it has NaN or infinite values, the first at element {index}")
        elif name in patient.changed:
            ledger.fail("tensor.checksum", name, "its bytes are not those that omnifp4.json recorded")


def _find_wide(original: Original, name: str) -> SourceTensor | TensorEntry | None:
    """The original of a wide tensor: of the same name, or inside a fused one, or the fused one itself."""
    return original.find(name) or original.source.checkpoint.tensors.get(name)


def _difference(
    reader: CheckpointReader, original: Original, entry: TensorEntry, found: SourceTensor | TensorEntry
) -> str:
    other, shape = (found, found.shape) if isinstance(found, TensorEntry) else (found.entry, found.spec.shape)
    if entry.dtype != other.dtype or entry.shape != shape:
        return f"it is {entry.dtype} {list(entry.shape)}, in the original {other.dtype} {list(shape)}"
    if isinstance(found, SourceTensor) and found.fused is not None:
        same = np.array_equal(reader.read(entry).reshape(-1), found.read(original.reader).reshape(-1))
        return "" if same else "its bytes are not those of the original"
    pairs = zip(_chunks(reader, entry), _chunks(original.reader, other), strict=True)
    return "" if all(np.array_equal(a, b) for a, b in pairs) else "its bytes are not those of the original"


def _first_nonfinite(reader: CheckpointReader, entry: TensorEntry) -> int:
    if entry.dtype not in WIDE_FLOATS:
        return -1
    dtype = NUMPY_DTYPES[entry.dtype]
    for number, chunk in enumerate(_chunks(reader, entry)):
        index = fast_cpu.scan(chunk.view(dtype), entry.dtype).nonfinite_index
        if index >= 0:
            return number * (CHUNK_BYTES // dtype.itemsize) + index
    return -1


def _chunks(reader: CheckpointReader, entry: TensorEntry) -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    for position in range(0, entry.nbytes, CHUNK_BYTES):
        chunk = np.empty(min(CHUNK_BYTES, entry.nbytes - position), dtype=np.uint8)
        reader.read_into(entry, chunk, position)
        yield chunk
