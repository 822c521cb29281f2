"""Opening a checkpoint whose index or shards may be wrong: every shard is read, the index is only asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from omnifp4.checkpoint.folder import (
    INDEX_NAME,
    Checkpoint,
    parse_index,
    read_config,
    read_json,
    read_shard_header,
    safe_path,
)
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.artifact import read_artifact
from omnifp4.conversion.ledger import Ledger
from omnifp4.errors import CheckpointError

COMPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class Opened:
    """A checkpoint opened as far as it goes.

    Attributes:
        checkpoint: every tensor that can be read, each once.
        unreadable: why a shard cannot be read, by file name.
        weight_map: of the index; None where there is none that can be read.
    """

    checkpoint: Checkpoint
    unreadable: Mapping[str, str]
    weight_map: Mapping[str, str] | None


def open_leniently(folder: Path, ledger: Ledger) -> Opened:
    """Read all shards of a folder, whatever the index says, and note in `ledger` what is wrong with them.

    Unreadable shards are only returned: whether they matter depends on what was in them.

    Raises:
        CheckpointError: no folder, no readable config, or no shard at all.
        ModelError: unknown model_type or unusable config.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder", hint="give the folder of an artifact")
    config = read_config(folder)
    files = sorted(p.name for p in folder.iterdir() if p.name.endswith(".safetensors") and not p.name.startswith("."))
    if not files:
        raise CheckpointError(f"{folder}: no weights: there is no safetensors file")
    weight_map, total_size = _read_index(folder, len(files), ledger)
    found: dict[str, list[TensorEntry]] = {}
    shard_bytes: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    for shard in files:
        try:
            entries, _, shard_bytes[shard] = read_shard_header(safe_path(folder, shard), shard)
        except CheckpointError as error:
            unreadable[shard] = str(error).removeprefix(f"{folder / shard}: ")
            continue
        for entry in entries:
            found.setdefault(entry.name, []).append(entry)
    all_files = Checkpoint(str(folder), config, {}, shard_bytes, folder)
    tensors = _choose(all_files, found, weight_map or {}, ledger)
    checkpoint = replace(all_files, tensors=tensors)
    if weight_map and unreadable.keys().isdisjoint(weight_map.values()):
        checkpoint = _without_strays(checkpoint, weight_map, ledger)
    if weight_map is not None:
        _compare_index(weight_map, total_size, checkpoint, unreadable, ledger)
    return Opened(checkpoint, unreadable, weight_map)


def _read_index(folder: Path, shards: int, ledger: Ledger) -> tuple[dict[str, str] | None, int | None]:
    path = folder / INDEX_NAME
    if not path.exists():
        if shards > 1:
            ledger.mend("index", INDEX_NAME, "it is missing", "rebuilt from the shards")
        return None, None
    try:
        return parse_index(read_json(path), INDEX_NAME)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{INDEX_NAME}: ").removeprefix(f"{path}: ")
        ledger.mend("index", INDEX_NAME, f"it cannot be used: {problem}", "rebuilt from the shards")
        return None, None


def _choose(
    checkpoint: Checkpoint, found: Mapping[str, list[TensorEntry]], weight_map: Mapping[str, str], ledger: Ledger
) -> dict[str, TensorEntry]:
    """One entry for each name: the one the index names, or any if their bytes are equal."""
    tensors = {}
    with CheckpointReader(checkpoint) as reader:
        for name, entries in found.items():
            tensors[name] = next((e for e in entries if e.shard == weight_map.get(name)), entries[0])
            if len(entries) == 1 or tensors[name].shard == weight_map.get(name):
                continue
            shards = " and ".join(entry.shard for entry in entries)
            if all(_same_bytes(reader, entries[0], other) for other in entries[1:]):
                ledger.mend("tensor.duplicate", name, f"it is in {shards}, with the same bytes", "kept once")
            else:
                ledger.fail(
                    "tensor.duplicate",
                    name,
                    f"it is in {shards}, with different bytes, and no index says which counts",
                    "removal of the shard that is wrong",
                )
    return tensors


def _same_bytes(reader: CheckpointReader, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for position in range(0, one.nbytes, COMPARE_BYTES):
        size = min(COMPARE_BYTES, one.nbytes - position)
        left, right = np.empty(size, dtype=np.uint8), np.empty(size, dtype=np.uint8)
        reader.read_into(one, left, position)
        reader.read_into(other, right, position)
        if not np.array_equal(left, right):
            return False
    return True


def _without_strays(checkpoint: Checkpoint, weight_map: Mapping[str, str], ledger: Ledger) -> Checkpoint:
    """Leave out shards that a complete index does not name."""
    strays = checkpoint.shard_bytes.keys() - set(weight_map.values())
    indexed = {name: entry for name, entry in checkpoint.tensors.items() if entry.shard not in strays}
    if not strays or not weight_map.keys() <= indexed.keys():
        return checkpoint
    shards = {shard: size for shard, size in checkpoint.shard_bytes.items() if shard not in strays}
    without = replace(checkpoint, tensors=indexed, shard_bytes=shards)
    artifact = read_artifact(without)
    if artifact.layout.missing(artifact.logical_names):
        return checkpoint
    for shard in sorted(strays):
        ledger.mend("shard.stray", shard, "the index, complete without it, does not name it", "left out")
    return without


def _compare_index(
    weight_map: Mapping[str, str],
    total_size: int | None,
    checkpoint: Checkpoint,
    unreadable: Mapping[str, str],
    ledger: Ledger,
) -> None:
    actual = {name: entry.shard for name, entry in checkpoint.tensors.items()}
    absent = [name for name, shard in weight_map.items() if name not in actual and shard not in unreadable]
    moved = [name for name, shard in weight_map.items() if name in actual and actual[name] != shard]
    unnamed = [name for name in actual if name not in weight_map]
    texts = [
        f"{len(names):,} tensors {what}, as {names[0]}"
        for names, what in (
            (absent, "that it names are in no shard"),
            (moved, "are in another shard than it says"),
            (unnamed, "of the shards are not in it"),
        )
        if names
    ]
    size = sum(entry.nbytes for entry in checkpoint.tensors.values())
    if total_size is not None and total_size != size and not texts and not unreadable:
        texts.append(f"its total_size is {total_size:,} and the tensors have {size:,} bytes")
    if texts:
        ledger.mend("index", INDEX_NAME, "; ".join(texts), "rebuilt from the shards")
