"""The trained tiny model as it ships: two files of BF16 tensors, read without torch.

Its model card, licences, results and training log stand beside the weights, in ``weights/``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

PARTS = ("thinker.safetensors", "speech.safetensors")
"""Thinker with its towers; talker, code predictor and code2wav."""

MOST_PIXELS = 128 * 128
"""Pixels of the largest pictures that the model learned from; the processor scales larger ones down to this."""


def trained_bytes(name: str) -> bytes:
    """A file of the trained model."""
    return files("omnifp4.tiny").joinpath("weights", name).read_bytes()


def trained_config() -> dict[str, Any]:
    """The trained model's config."""
    config: dict[str, Any] = json.loads(trained_bytes("config.json"))
    return config


def trained_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its checkpoint name, in the order of the files."""
    return {name: tuple(entry["shape"]) for _, header, _ in _parts() for name, entry in header.items()}


def trained_tensors() -> Iterator[tuple[str, memoryview]]:
    """Every tensor's name and BF16 bytes, little-endian, in the same order."""
    for data, header, start in _parts():
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            yield name, data[start + first : start + end]


def _parts() -> Iterator[tuple[memoryview, dict[str, Any], int]]:
    """Each file's bytes, its header without metadata, and where its data begins."""
    for name in PARTS:
        data = memoryview(trained_bytes(name))
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        yield data, header, 8 + length
