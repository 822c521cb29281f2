"""What an original tells about the rest of the folder: settings of the config, and files beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.folder import Checkpoint, read_json
from omnifp4.checkpoint.side_files import side_files
from omnifp4.conversion.judge_config import SPEECH_FLAG
from omnifp4.conversion.ledger import Ledger
from omnifp4.conversion.original import Original
from omnifp4.errors import CheckpointError
from omnifp4.receipt.repair import Effect

FREE_KEYS: Final = frozenset(
    {
        "quantization_config",
        "compression_config",
        "transformers_version",
        "_name_or_path",
        "torch_dtype",
        "dtype",
        SPEECH_FLAG,
    }
)
"""Keys that tools write anew when they save, and the one that `settle_speech` judges by the weights."""

LOADED_SUFFIXES: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
"""Ends of names of files that tokenizers and processors read."""

DISPENSABLE: Final = frozenset({Path("generation_config.json")})


def settle_settings(checkpoint: Checkpoint, original: Original | None, ledger: Ledger) -> Checkpoint:
    """Give settings that both configs have the original's values.

    Raises:
        CheckpointError: the original is a model of another type.
    """
    if original is None:
        return checkpoint
    ours, theirs = dict(checkpoint.config), dict(original.source.checkpoint.config)
    if ours.get("model_type") != theirs.get("model_type"):
        thinker = theirs.get("thinker_config")
        if not isinstance(thinker, dict) or ours.get("model_type") != f"{theirs.get('model_type')}_thinker":
            raise CheckpointError(
                f"{original.source.checkpoint.location}: is a {theirs.get('model_type')} and {checkpoint.location} a "
                f"{ours.get('model_type')}, so it is not its original",
                hint="give the wide checkpoint that the artifact was made from",
            )
        theirs = thinker
    for key, mine, other in _differences(ours, theirs, ""):
        problem = f"{key} is {_short(mine)}, in the original {_short(other)}"
        ledger.mend("config.source", key, problem, "set to the original's", Effect.NONE)
    return replace(checkpoint, config=_merged(ours, theirs))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, Any]]:
    for key, mine in ours.items():
        if key in FREE_KEYS or key not in theirs:
            continue
        other = theirs[key]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _differences(mine, other, f"{path}{key}.")
        elif mine != other:
            yield f"{path}{key}", mine, other


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, mine in ours.items():
        if key in theirs and key not in FREE_KEYS:
            other = theirs[key]
            result[key] = _merged(mine, other) if isinstance(mine, dict) and isinstance(other, dict) else other
    return result


def find_lost_files(folder: Path, original: Original | None, ledger: Ledger, *, is_ours: bool) -> dict[Path, Path]:
    """Files of the original that the artifact lacks, or that cannot be read there.

    Args:
        folder: the artifact.
        original: if one was given.
        ledger: what was found.
        is_ours: made by this package, which copies all of them; other tools save some under other names.

    Returns:
        Where to copy from, by path in the folder.
    """
    home = original.source.checkpoint.folder if original else None
    lost: dict[Path, Path] = {}
    for name in side_files(home) if home else ():
        if home is None or name.suffix not in LOADED_SUFFIXES or len(name.parts) > 1:
            continue
        if problem := _file_problem(folder / name, is_needed=is_ours and name not in DISPENSABLE):
            lost[name] = home / name
            ledger.mend("files.side", str(name), problem, "copied from the original")
    return lost


def _file_problem(path: Path, *, is_needed: bool) -> str:
    if not path.is_file():
        return "it is missing" if is_needed else ""
    if path.stat().st_size == 0:
        return "it is empty"
    if path.suffix == ".json":
        try:
            read_json(path)
        except CheckpointError as error:
            return f"it cannot be read: {str(error).removeprefix(f'{path}: ')}"
    return ""


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
