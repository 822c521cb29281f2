"""Which model statistics and maps belong to: told from a sample of its weights, however they are cut into files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.reader import CheckpointReader

SAMPLED_BYTES: Final = 256
EXPERT: Final = re.compile(r"(?P<before>.*\.experts\.)(?P<number>\d+)(?P<after>\..*)")


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the names, types and shapes of all tensors, and of the first bytes of most of them.

    A copy in other shards has the same; a finetune of the same shapes has another, also one of attention alone: every
    tensor is sampled, but of the experts of a layer each projection of one.

    Raises:
        CheckpointError: only the checkpoint's headers are here, or a file cannot be read.
    """
    names = sorted(checkpoint.tensors)
    digest = hashlib.sha256(str(checkpoint.config.get("model_type")).encode())
    for name in names:
        entry = checkpoint.tensors[name]
        digest.update(f"\n{name}|{entry.dtype}|{entry.shape}".encode())
    with CheckpointReader(checkpoint) as reader:
        for name in _sampled(names):
            entry = checkpoint.tensors[name]
            sample = np.empty(min(entry.nbytes, SAMPLED_BYTES), dtype=np.uint8)
            reader.read_into(entry, sample)
            digest.update(sample.tobytes())
    return digest.hexdigest()


def _sampled(names: Sequence[str]) -> Iterator[str]:
    """All tensors but those of experts, and of each layer's experts another one for each projection."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            groups.setdefault(f"{match['before']}*{match['after']}", []).append(name)
        else:
            yield name
    for number, group in enumerate(groups.values()):
        yield group[number % len(group)]
