"""Which model statistics belong to: told from a few kilobytes of its weights, however they are cut into files."""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.reader import CheckpointReader

SAMPLED_TENSORS: Final = 256
SAMPLED_BYTES: Final = 256


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the names, types and shapes of all tensors, and of the first bytes of some, spread evenly by name.

    A copy in other shards has the same; a finetune of the same shapes has another.

    Raises:
        CheckpointError: only the checkpoint's headers are here, or a file cannot be read.
    """
    names = sorted(checkpoint.tensors)
    digest = hashlib.sha256(str(checkpoint.config.get("model_type")).encode())
    for name in names:
        entry = checkpoint.tensors[name]
        digest.update(f"\n{name}|{entry.dtype}|{entry.shape}".encode())
    step = max(1, len(names) // SAMPLED_TENSORS)
    with CheckpointReader(checkpoint) as reader:
        for name in names[::step]:
            entry = checkpoint.tensors[name]
            sample = np.empty(min(entry.nbytes, SAMPLED_BYTES), dtype=np.uint8)
            reader.read_into(entry, sample)
            digest.update(sample.tobytes())
    return digest.hexdigest()
