"""Writes checkpoints: the bundled tiny omni model, or random weights for it or any known config at its real shapes.

The config says what exists (`omnifp4.models.layout_for`), `trained` and `weights` say what the numbers are,
`shards` says where they go. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from omnifp4.errors import ModelError, OutputError
from omnifp4.models import layout_for
from omnifp4.models.base import Part, TensorSpec
from omnifp4.tiny import trained, weights
from omnifp4.tiny.shards import BF16_BYTES, Shard, Slot, claim_folder, index_text, plan_shards, write_file

TINY_SHARD_BYTES = 50_000_000
"""More than the tiny model has: one file, unless a caller asks for several."""
REAL_SHARD_BYTES = 5_000_000_000
PART_ELEMENTS = 1 << 22
"""Elements drawn and written at a time by one worker (8 MiB)."""

RELEASED_CONFIGS = {"qwen3-omni-30b-a3b": "qwen3-omni-30b-a3b.json"}
"""Configs of released models that ship with the package, by name."""

TINY_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""Everything beside weights and config that the processor and `generate` read."""


def asset_bytes(name: str) -> bytes:
    """A file of package data."""
    return files("omnifp4.tiny").joinpath("assets", name).read_bytes()


def tiny_config() -> dict[str, Any]:
    """The config of the tiny omni model of random weights; `trained.trained_config` is the trained one's."""
    config: dict[str, Any] = json.loads(asset_bytes("config.json"))
    return config


def released_config(name: str) -> dict[str, Any]:
    """The config of a released model.

    Args:
        name: a key of `RELEASED_CONFIGS`.

    Raises:
        ModelError: no config of that name ships with the package.
    """
    if name not in RELEASED_CONFIGS:
        known = ", ".join(RELEASED_CONFIGS)
        raise ModelError(f"no config named {name!r} ships with omnifp4", hint=f"known: {known}; or give a config file")
    config: dict[str, Any] = json.loads(asset_bytes(RELEASED_CONFIGS[name]))
    return config


def write_tiny_omni(
    folder: str | os.PathLike[str],
    *,
    random_weights: bool = False,
    seed: int | None = None,
    layers: int | None = None,
    shard_bytes: int = TINY_SHARD_BYTES,
) -> Path:
    """Writes a small, complete Qwen3-Omni checkpoint: the trained tiny model, or random weights at smaller sizes.

    It has every part of the released architecture, a tokenizer with the released special tokens, and all that
    Transformers needs to load model and processor offline. What the trained one can do stands in its model card,
    ``tiny/weights/README.md`` of the package.

    Args:
        folder: to write to; made if missing, refused if not empty.
        random_weights: write random weights. Naming a seed or layers does too.
        seed: of random weights, 0 if None; the same seed gives the same bytes.
        layers: decoder layers of the thinker of random weights; None keeps the config's four.
        shard_bytes: the most data bytes in one weight file.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty or cannot be written.
    """
    beside = {name: asset_bytes(name) for name in TINY_FILES}
    if random_weights or seed is not None or layers is not None:
        config = with_layers(tiny_config(), layers)
        return _write(config, layout_for(config).tensors, Path(folder), seed or 0, shard_bytes, 1, beside, None)
    preprocessor = json.loads(beside["preprocessor_config.json"]) | {"max_pixels": trained.MOST_PIXELS}
    beside["preprocessor_config.json"] = (json.dumps(preprocessor, indent=2) + "\n").encode()
    return _write_trained(Path(folder), shard_bytes, beside)


def write_random_checkpoint(
    config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    shard_bytes: int = REAL_SHARD_BYTES,
    layers: int | None = None,
    text_only: bool = False,
    workers: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Writes random weights under a config's exact names and shapes, for work on real sizes without a download.

    Memory stays at a few buffers a worker; the bytes depend on config and seed, never on `workers`.

    Args:
        config: of any model type that `omnifp4.models` knows.
        folder: to write to; made if missing, refused if not empty.
        seed: of the weights.
        shard_bytes: the most data bytes in one weight file.
        layers: decoder layers of the thinker (or of the text model); None keeps the config's.
        text_only: write the thinker's text decoder alone, under its omni names. Towers and speech are missing then:
            enough to time quantization, not to load as an omni model.
        workers: threads; None takes one per processor.
        on_bytes: called after each written part with its bytes, from any worker.

    Returns:
        The folder.

    Raises:
        ModelError: the model type is unknown, or `layers` does not fit it.
        OutputError: the folder is not empty, cannot be written, or its disk is too small.
    """
    plain = with_layers(config, layers)
    if text_only and "enable_audio_output" in plain:
        plain["enable_audio_output"] = False
    layout = layout_for(plain)
    tensors = layout.tensors
    if text_only:
        tensors = tuple(tensor for tensor in tensors if tensor.component.part is Part.THINKER)
    count = workers if workers is not None else (os.cpu_count() or 1)
    return _write(plain, tensors, Path(folder), seed, shard_bytes, max(1, count), {}, on_bytes)


def with_layers(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """A copy of `config` whose text decoder has `layers` layers; None keeps them.

    Raises:
        ModelError: `layers` is less than 1.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    if layers is None:
        return changed
    if layers < 1:
        raise ModelError(f"a model needs at least one decoder layer, not {layers}")
    section = changed.get("thinker_config", changed)
    section = section.get("text_config", section)
    section["num_hidden_layers"] = layers
    if section.get("layer_types"):
        section["layer_types"] = section["layer_types"][:layers]
    talker = changed.get("talker_config")
    if talker:
        # The talker reads the hidden states after this layer, which must exist.
        talker["accept_hidden_layer"] = min(talker["accept_hidden_layer"], layers)
    return changed


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one tensor: the unit of work."""

    descriptor: int
    slot: Slot
    draw: weights.Draw
    number: int
    first_row: int
    rows: int


def _parts(shards: tuple[Shard, ...], descriptors: list[int], draws: Mapping[str, weights.Draw]) -> Iterator[_Part]:
    for shard, descriptor in zip(shards, descriptors, strict=True):
        for slot in shard.slots:
            rows = slot.shape[0]
            step = max(1, PART_ELEMENTS * rows * BF16_BYTES // slot.byte_count)
            for number, first in enumerate(range(0, rows, step)):
                yield _Part(descriptor, slot, draws[slot.name], number, first, min(step, rows - first))


def _write(
    config: Mapping[str, Any],
    tensors: tuple[TensorSpec, ...],
    folder: Path,
    seed: int,
    shard_bytes: int,
    workers: int,
    files_beside: Mapping[str, bytes],
    on_bytes: Callable[[int], None] | None,
) -> Path:
    needed = [tensor for tensor in tensors if not tensor.optional]
    draws = {t.name: weights.draw_for(t.name, t.shape, t.is_linear) for t in needed}
    shards = plan_shards(((t.name, t.shape) for t in needed), shard_bytes)
    with _checkpoint(config, shards, folder, files_beside) as descriptors:
        _write_parts(_parts(shards, descriptors, draws), seed, workers, on_bytes)
    return folder


def _write_trained(folder: Path, shard_bytes: int, files_beside: Mapping[str, bytes]) -> Path:
    config = trained.trained_config()
    shapes = trained.trained_shapes()
    shards = plan_shards(shapes.items(), shard_bytes)
    place = {slot.name: (number, slot.offset) for number, shard in enumerate(shards) for slot in shard.slots}
    with _checkpoint(config, shards, folder, files_beside) as descriptors:
        for name, data in trained.trained_tensors():
            number, offset = place[name]
            _write_all(descriptors[number], data, offset)
    return folder


@contextmanager
def _checkpoint(
    config: Mapping[str, Any], shards: tuple[Shard, ...], folder: Path, files_beside: Mapping[str, bytes]
) -> Iterator[list[int]]:
    """A checkpoint under way: gives a descriptor for each shard; all is in place when the block ends without an error."""
    claim_folder(folder)
    total = sum(shard.byte_count for shard in shards)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OutputError(f"{folder} needs {total:,} bytes, its disk has {free:,} free", hint="choose another disk")
    partials = [folder / f"{shard.file_name}.partial" for shard in shards]
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(path.open("wb")) for path in partials]
            for shard, file in zip(shards, opened, strict=True):
                file.write(shard.header)
                file.truncate(shard.byte_count)
                file.flush()
            yield [file.fileno() for file in opened]
        for shard, path in zip(shards, partials, strict=True):
            path.replace(folder / shard.file_name)
        if len(shards) > 1:
            write_file(folder / "model.safetensors.index.json", index_text(shards).encode())
        for name, data in files_beside.items():
            write_file(folder / name, data)
        # Last, because a folder with a config counts as a checkpoint.
        write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        # After a failure or an interrupt, so that the next try does not find the folder occupied by torn files.
        for path in partials:
            path.unlink(missing_ok=True)


def _write_parts(parts: Iterator[_Part], seed: int, workers: int, on_bytes: Callable[[int], None] | None) -> None:
    memory = threading.local()

    def write(part: _Part) -> None:
        row_shape = part.slot.shape[1:]
        elements = part.rows * part.slot.byte_count // BF16_BYTES // part.slot.shape[0]
        # One buffer a worker: fresh memory for each part would cost more than its numbers.
        buffer = getattr(memory, "buffer", None)
        if buffer is None or buffer.size < elements:
            buffer = memory.buffer = np.empty(elements, np.uint16)
        rows = buffer[:elements].reshape(part.rows, *row_shape)
        weights.fill(rows, part.draw, seed, part.slot.name, part.number)
        row_bytes = part.slot.byte_count // part.slot.shape[0]
        _write_all(part.descriptor, rows.data.cast("B"), part.slot.offset + part.first_row * row_bytes)
        if on_bytes is not None:
            on_bytes(rows.nbytes)

    if workers == 1:
        for part in parts:
            write(part)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(write, parts):
            pass


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """`os.pwrite` until all is written; one call stops at 2 GiB."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written
