"""What was worked out for a sample is kept on disk, so that it is not worked out again, nor lost when a run is killed.

A folder a key, a file a sample. The key holds everything that the numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np

from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import OutputError
from omnifp4.receipt.evaluation import METRIC_VERSION

CACHE_VARIABLE: Final = "OMNIFP4_CACHE"

Arrays = dict[str, "np.typing.NDArray[Any]"]


def default_cache() -> Path:
    """``$OMNIFP4_CACHE/evaluation``, or ``omnifp4/evaluation`` in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named) / "evaluation"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnifp4" / "evaluation"


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """Names a checkpoint by its headers and by its files' sizes and times of change."""
    stamps = json.dumps(file_stamps(checkpoint), sort_keys=True)
    return hashlib.sha256((headers_sha256(checkpoint) + stamps).encode()).hexdigest()


def content_key(kind: str, parts: Mapping[str, str]) -> str:
    """A folder name for results of one kind that depend on `parts`, the metric and the libraries."""
    import torch
    import transformers

    whole = {
        "metric": str(METRIC_VERSION),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **parts,
    }
    return f"{kind}-{hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]}"


class Store:
    """Arrays by sample, of one key."""

    def __init__(self, cache: Path | None, key: str) -> None:
        """`cache` None keeps nothing."""
        self._folder = cache / key if cache is not None else None
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{self._folder}: cannot be made: {error.strerror}", hint="choose another folder with --cache"
                ) from None

    def read(self, sample: str) -> Arrays | None:
        """What was written for a sample; None if nothing was, or if it is damaged."""
        if self._folder is None:
            return None
        try:
            with np.load(self._path(sample), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, BadZipFile):
            return None

    def write(self, sample: str, arrays: Mapping[str, Any]) -> None:
        """Keep what was worked out; it appears whole or not at all."""
        if self._folder is None:
            return
        path = self._path(sample)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            # Another run of the same pair may have ended, and removed the folder.
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(
                f"{path}: cannot be written: {error.strerror}", hint="--cache names another folder"
            ) from None

    def remove(self) -> None:
        """Forget all of it."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, sample: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{sample}.npz"
