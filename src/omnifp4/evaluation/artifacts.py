"""What an artifact tells of itself: its recipe, and how large it is."""

from __future__ import annotations

from omnifp4.checkpoint.folder import Checkpoint, read_json
from omnifp4.checkpoint.side_files import RECEIPT_NAME

NOT_KNOWN = "not known"


def told_recipe(checkpoint: Checkpoint) -> tuple[str, str]:
    """Recipe and scale rule as the artifact's own receipt tells them; of a wide checkpoint, that it is wide."""
    path = checkpoint.folder / RECEIPT_NAME if checkpoint.folder is not None else None
    receipt = read_json(path) if path is not None and path.is_file() else {}
    told = receipt if isinstance(receipt, dict) else {}
    if not told and "quantization_config" not in checkpoint.config:
        return "wide", "none"
    return str(told.get("recipe", NOT_KNOWN)), str(told.get("rule", NOT_KNOWN))


def bits_per_weight(checkpoint: Checkpoint, reference: Checkpoint) -> float:
    """Bits of all tensors of a checkpoint over the parameters of what it was made from."""
    parameters = sum(entry.parameters for entry in reference.tensors.values())
    return 8 * sum(entry.nbytes for entry in checkpoint.tensors.values()) / parameters
