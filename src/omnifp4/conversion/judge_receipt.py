"""Whether omnifp4.json still speaks of these files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.side_files import RECEIPT_NAME
from omnifp4.conversion.ledger import Ledger


def judge_receipt(folder: Path, receipt: Mapping[str, Any] | None, checkpoint: Checkpoint, ledger: Ledger) -> None:
    """Note a record that cannot be read, or that knows other shards or tensors than are there.

    Tensors whose bytes changed are another matter: they are damage to be judged with the tensors.
    """
    if receipt is None:
        if (folder / RECEIPT_NAME).exists():
            ledger.mend("receipt", RECEIPT_NAME, "it cannot be read", "replaced by the record of this repair")
        return
    shards, tensors = receipt.get("shards"), receipt.get("tensors")
    problems = []
    if isinstance(shards, dict) and shards != dict(checkpoint.shard_bytes):
        problems.append("the shards have other names or sizes than it says")
    if isinstance(tensors, dict) and tensors:
        if unknown := [name for name in checkpoint.tensors if name not in tensors]:
            problems.append(f"it knows nothing of {len(unknown):,} tensors, as {unknown[0]}")
        if gone := [name for name in tensors if name not in checkpoint.tensors]:
            problems.append(f"it knows {len(gone):,} tensors that are not there, as {gone[0]}")
    if problems:
        ledger.mend("receipt", RECEIPT_NAME, "; ".join(problems), "brought up to date with the files")
