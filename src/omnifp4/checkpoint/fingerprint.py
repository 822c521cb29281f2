"""Telling checkpoints apart without reading their weights."""

from __future__ import annotations

import hashlib
import json

from omnifp4.checkpoint.folder import Checkpoint, safe_path


def headers_sha256(checkpoint: Checkpoint) -> str:
    """A digest of the config and of every tensor's name, dtype, shape and place."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        entry = checkpoint.tensors[name]
        digest.update(f"\n{name}|{entry.shard}|{entry.dtype}|{entry.shape}|{entry.begin}|{entry.end}".encode())
    return digest.hexdigest()


def file_stamps(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and modification time in nanoseconds of every shard: whether the weights may have changed between runs."""
    if checkpoint.folder is None:
        return {}
    stamps = {}
    for shard in checkpoint.shard_bytes:
        status = safe_path(checkpoint.folder, shard).stat()
        stamps[shard] = [status.st_size, status.st_mtime_ns]
    return stamps
