"""Everything of a converted or repaired artifact that is not weights: config, index, side files, receipt, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.folder import CONFIG_NAME, INDEX_NAME, read_json
from omnifp4.checkpoint.output import PlannedOutput, write_json, write_text
from omnifp4.checkpoint.side_files import CARD_NAME, RECEIPT_NAME, copy_side_files
from omnifp4.errors import CheckpointError
from omnifp4.receipt.base import Record, package_version

QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config")
STALE_FILES: Final = frozenset({"quantization_config.json"})
"""Second copies of the quantization_config that other tools write beside the config; they would contradict it."""

CHANGES_KEY: Final = "changes"
"""Where omnifp4.json lists what was done to the artifact after it was made, oldest first."""


def producer() -> dict[str, str]:
    """Who wrote the config, in ModelOpt's words."""
    return {"name": "omnifp4", "version": package_version()}


def without_claims(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without any quantization_config, however deep."""
    return {
        key: without_claims(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (key in QUANTIZATION_KEYS and isinstance(value, dict))
    }


def write_package(
    source: Path,
    target: Path,
    config: Mapping[str, Any],
    planned: PlannedOutput,
    receipt: Record,
    updates: Mapping[str, Any],
    note: str,
) -> None:
    """Write all of it into the staging folder.

    Args:
        source: the artifact that was converted or repaired.
        target: the staging folder.
        config: the whole new config.json.
        planned: for the index.
        receipt: of this run; appended to the changes in omnifp4.json, or alone there if there was none.
        updates: fields of an earlier omnifp4.json that no longer hold.
        note: appended to the card.

    Raises:
        OSError: the folder cannot be written.
    """
    write_json(target / CONFIG_NAME, config)
    if index := planned.index():
        write_json(target / INDEX_NAME, index)
    copy_side_files(source, target, without=STALE_FILES, keep_card=False)
    write_text(target / RECEIPT_NAME, json.dumps(_continued(source, receipt, updates)) + "\n")
    card = _read_card(source / CARD_NAME)
    write_text(target / CARD_NAME, f"{card.rstrip()}\n\n{note}\n" if card else f"{note}\n")


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """omnifp4.json of an artifact; None where there is none that can be read."""
    path = folder / RECEIPT_NAME
    if not path.is_file():
        return None
    try:
        receipt = read_json(path)
    except CheckpointError:
        return None
    return receipt if isinstance(receipt, dict) else None


def _continued(source: Path, receipt: Record, updates: Mapping[str, Any]) -> dict[str, Any]:
    record = receipt.model_dump(mode="json")
    earlier = read_receipt(source)
    if earlier is None:
        return record
    changes = earlier.get(CHANGES_KEY)
    history = list(changes) if isinstance(changes, list) else []
    # The checksums stand once, at the top, where they are those of the files.
    history.append({key: value for key, value in record.items() if key != "tensors"})
    return {**earlier, **{key: value for key, value in updates.items() if key in earlier}, CHANGES_KEY: history}


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""
