"""What calibrated recipes make that neither a conversion nor a repair can carry."""

from __future__ import annotations

from pathlib import Path

from omnifp4.checkpoint.branch import find_branches
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.folds import FOLDS_NAME, read_folds
from omnifp4.errors import CheckpointError


def refuse_branches(checkpoint: Checkpoint) -> None:
    """Refuse an artifact with low-rank branches: without them its codes stand for other weights. Raises CheckpointError."""
    if branches := find_branches(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.location}: {next(iter(branches))} has a low-rank branch (SVDQuant), which is kept as it is only",
            hint="quantize the wide model again in the form that is wanted",
        )


def refuse_folds(folder: Path) -> None:
    """Refuse to compare an artifact whose channels were scaled (AWQ) with a wide source. Raises CheckpointError."""
    if len(read_folds(folder)):
        raise CheckpointError(
            f"{folder}: its channels were scaled ({FOLDS_NAME}), so weights of the wide source do not fit into it",
            hint="quantize the wide model again, or repair without --source",
        )
