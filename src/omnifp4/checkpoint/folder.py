"""A checkpoint folder: config, shards and index, checked before anything is read from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from omnifp4.checkpoint.header import LENGTH_BYTES, TensorEntry, header_length, parse_header, strict_json
from omnifp4.errors import CheckpointError

CONFIG_NAME: Final = "config.json"
SINGLE_SHARD_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
LEGACY_QUANT_CONFIG_NAME: Final = "hf_quant_config.json"
JSON_LIMIT_BYTES: Final = 200_000_000
OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Ends of names of weights in forms that are not read here."""


@dataclass(frozen=True)
class Checkpoint:
    """Config and headers of a checkpoint; the weights stay where they are.

    Attributes:
        location: folder, or Hub id with revision, for messages.
        config: config.json.
        tensors: every tensor of every shard, by name.
        shard_bytes: size of each shard file, by file name.
        folder: where the files are; None for a checkpoint whose headers alone were fetched.
        metadata: ``__metadata__`` of each shard, by file name.
        index_total_size: ``metadata.total_size`` of the index, if there is one.
    """

    location: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    shard_bytes: Mapping[str, int]
    folder: Path | None = None
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    index_total_size: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all shard files, headers included."""
        return sum(self.shard_bytes.values())


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config, index and every shard's header of a local folder.

    Raises:
        CheckpointError: a file is missing, malformed or truncated, the index and the shards disagree, or a file name
            leads out of the folder. The message names file and tensor.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder", hint="give a checkpoint folder or a Hub id")
    config = read_config(root)
    weights = find_weights(str(root), list_names(root), lambda: read_json(root / INDEX_NAME))
    headers = ((shard, *read_shard_header(safe_path(root, shard), shard)) for shard in weights.shards)
    return assemble(str(root), config, weights, headers, root)


@dataclass(frozen=True)
class Weights:
    """Which shards a checkpoint has.

    Attributes:
        shards: plain file names, sorted.
        weight_map: the index's file name for each tensor; None for a single shard without an index.
        total_size: what the index states, if it does.
    """

    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    total_size: int | None = None


def find_weights(location: str, names: Collection[str], index: Callable[[], Any]) -> Weights:
    """Choose the shards from the names of a checkpoint's files.

    Args:
        location: folder or Hub id, for messages.
        names: its files.
        index: reads the index file; called only if there is one.

    Raises:
        CheckpointError: no safetensors weights, two sets of them, or an unusable index.
    """
    if INDEX_NAME in names:
        weight_map, total_size = parse_index(index(), f"{location}/{INDEX_NAME}")
        shards = tuple(sorted(set(weight_map.values())))
        if SINGLE_SHARD_NAME in names and SINGLE_SHARD_NAME not in shards:
            raise CheckpointError(
                f"{location}: holds both {SINGLE_SHARD_NAME} and an index of other shards; remove one"
            )
        return Weights(shards, weight_map, total_size)
    if SINGLE_SHARD_NAME in names:
        return Weights((SINGLE_SHARD_NAME,))
    if shards := tuple(sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)):
        raise CheckpointError(f"{location}/{INDEX_NAME}: missing, though there are shards ({shards[0]} …)")
    if other := next((name for name in sorted(names) if name.endswith(OTHER_WEIGHTS)), None):
        raise CheckpointError(f"{location}: weights are in {other}; safetensors are needed")
    raise CheckpointError(f"{location}: no weights: neither {SINGLE_SHARD_NAME} nor {INDEX_NAME}")


def assemble(
    location: str,
    config: Mapping[str, Any],
    weights: Weights,
    headers: Iterable[tuple[str, list[TensorEntry], dict[str, str], int]],
    folder: Path | None,
) -> Checkpoint:
    """A checkpoint of its parts: for each shard its name, entries, metadata and size, which must fit the index."""
    entries: dict[str, TensorEntry] = {}
    shard_bytes: dict[str, int] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for shard, shard_entries, shard_metadata, size in headers:
        metadata[shard], shard_bytes[shard] = shard_metadata, size
        add_entries(entries, shard_entries, f"{location}/{shard}")
    if weights.weight_map is not None:
        check_index(weights.weight_map, entries, f"{location}/{INDEX_NAME}")
    return Checkpoint(location, config, entries, shard_bytes, folder, metadata, weights.total_size)


def list_names(root: Path) -> set[str]:
    """The names in a folder."""
    try:
        return {path.name for path in root.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}") from None


def add_entries(entries: dict[str, TensorEntry], new: list[TensorEntry], subject: str) -> None:
    """Add a shard's entries, refusing a tensor that an earlier shard has."""
    for entry in new:
        if entry.name in entries:
            raise CheckpointError(f"{subject}: tensor {entry.name!r} is also in {entries[entry.name].shard}")
        entries[entry.name] = entry


def read_config(root: Path) -> dict[str, Any]:
    """config.json of a folder, as a dict."""
    if CONFIG_NAME not in list_names(root):
        raise CheckpointError(f"{root / CONFIG_NAME}: no such file, so {root} is no checkpoint folder")
    return as_config(read_json(root / CONFIG_NAME), str(root / CONFIG_NAME))


def as_config(value: Any, subject: str) -> dict[str, Any]:
    """The content of a config.json, which must be an object."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{subject}: the config is no JSON object")
    return value


def read_json(path: Path) -> Any:
    """Parse a JSON file strictly; errors name the file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: no file")
        if path.stat().st_size > JSON_LIMIT_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes of JSON are absurd")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8") from None
    return strict_json(text, str(path))


def parse_index(index: Any, subject: str) -> tuple[dict[str, str], int | None]:
    """Check an index: its weight map (tensor name to plain file name) and the total size it states."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{subject}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise CheckpointError(f"{subject}: tensor {name!r} is said to be in {shard!r}, which is no plain file name")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{subject}: tensor {name!r} is said to be in {shard!r}, which is no safetensors file"
            )
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and math.isfinite(total):
        return weight_map, int(total)
    return weight_map, total if type(total) is int else None


def is_plain_name(name: str) -> bool:
    """Whether a file name stays in its folder: no separator, no parent, no drive, no control character."""
    return (
        name not in {"", ".", ".."}
        and PurePosixPath(name).name == name
        and not any(char in name for char in "\\:/")
        and name.isprintable()
    )


def safe_path(root: Path, name: str) -> Path:
    """The path of a file of the folder, refusing links that lead out of it.

    A link inside the Hub's cache (``snapshots/REVISION/file`` to ``blobs/HASH`` of the same repository) is right.
    """
    if not is_plain_name(name):
        raise CheckpointError(f"{root}: {name!r} is no plain file name")
    path = root / name
    try:
        if path.is_symlink():
            _check_target(path, root)
        if not path.exists():
            raise CheckpointError(f"{path}: missing, though the checkpoint needs it")
        if not path.is_file():
            raise CheckpointError(f"{path}: no file")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return path


def _check_target(link: Path, root: Path) -> None:
    target, home = Path(os.path.realpath(link)), Path(os.path.realpath(root))
    allowed = [home]
    if home.parent.name == "snapshots":
        repository = home.parent.parent
        # Blobs of one repository, and those that newer versions of the cache share between repositories.
        allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(f"{link}: a link that leads out of the checkpoint, to {target}")


def read_shard_header(path: Path, shard: str) -> tuple[list[TensorEntry], dict[str, str], int]:
    """Entries, metadata and file size of one shard."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(LENGTH_BYTES), file_bytes, str(path))
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    entries, metadata = parse_header(raw, shard, file_bytes, str(path))
    return entries, metadata, file_bytes


def check_index(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], subject: str) -> None:
    """Refuse an index that disagrees with the shards."""
    for name, shard in weight_map.items():
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(f"{subject}: tensor {name!r} is not in {shard}, where the index says it is")
        if entry.shard != shard:
            raise CheckpointError(f"{subject}: tensor {name!r} is in {entry.shard}, not in {shard}")
    for name, entry in entries.items():
        if name not in weight_map:
            raise CheckpointError(f"{subject}: tensor {name!r} of {entry.shard} is not in the index")
