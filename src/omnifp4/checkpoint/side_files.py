"""The files of a checkpoint beside its weights: tokenizer, processor, chat template, generation config, licence …"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final

from omnifp4.checkpoint.folder import CONFIG_NAME, INDEX_NAME, LEGACY_QUANT_CONFIG_NAME
from omnifp4.errors import CheckpointError

RECEIPT_NAME: Final = "omnifp4.json"
CARD_NAME: Final = "README.md"
SOURCE_CARD_NAME: Final = "README.source.md"

REWRITTEN: Final = frozenset({CONFIG_NAME, INDEX_NAME, LEGACY_QUANT_CONFIG_NAME, RECEIPT_NAME, CARD_NAME})
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json")
SIDE_FILE_LIMIT_BYTES: Final = 500_000_000


def side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of all files that go along unchanged; hidden ones and weights stay behind.

    Raises:
        CheckpointError: a side file is absurdly large, or a link leads out of the folder (links into the Hub's cache
            are right).
    """
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        # Blobs of the repository, and those that newer versions of the cache share between repositories.
        allowed += [home.parent.parent / "blobs", home.parent.parent.parent / "blobs"]
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent) / name
            relative = path.relative_to(folder)
            if name.startswith(".") or (name.endswith(WEIGHT_SUFFIXES) and str(relative) not in REWRITTEN):
                continue
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in allowed):
                raise CheckpointError(f"{path}: a link that leads out of the checkpoint, to {target}")
            if not target.is_file() or str(relative) in REWRITTEN:
                continue
            if (size := target.stat().st_size) > SIDE_FILE_LIMIT_BYTES:
                raise CheckpointError(f"{path}: {size} bytes are too many for a file beside the weights")
            found.append(relative)
    return found


def side_file_bytes(folder: Path) -> int:
    """Bytes of all side files."""
    return sum((folder / path).stat().st_size for path in side_files(folder))


def copy_side_files(source: Path, target: Path, *, without: Collection[str] = (), keep_card: bool = True) -> list[str]:
    """Copy side files, and the source's model card under another name.

    Args:
        source: folder to copy from.
        target: folder to copy to.
        without: relative names of side files that stay behind.
        keep_card: False where the caller writes a card that continues the source's own.

    Returns:
        The names written.

    Raises:
        OSError: the target cannot be written.
        CheckpointError: a side file is absurdly large, or a link leads out of the folder.
    """
    written = []
    for relative in side_files(source):
        if str(relative) in without:
            continue
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, destination)
        written.append(str(relative))
    # A card of that name from an interrupted run may be torn, so what was there before does not count.
    if keep_card and (source / CARD_NAME).is_file() and SOURCE_CARD_NAME not in written:
        shutil.copyfile(source / CARD_NAME, target / SOURCE_CARD_NAME)
        written.append(SOURCE_CARD_NAME)
    return written
