"""Powers of two that were moved from the inputs of linears into what comes before them, kept beside the weights.

Each entry is named after the tensor whose **outputs** were divided: a norm's weight, or an up projection (its rows). Every
linear that reads them has its columns multiplied by the same. The file lets a proof undo this exactly; to run the model
it is not needed.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.errors import CheckpointError

FOLDS_NAME: Final = "omnifp4-folds.json"
FOLDS_VERSION: Final = 1
LARGEST_EXPONENT: Final = 16

Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Fold:
    """One fold.

    Attributes:
        origin: tensor whose outputs are divided by ``2**exponents``: a vector, or the rows of a weight.
        vectors: further vectors that are divided alike (a bias of the origin).
        readers: weights whose columns are multiplied.
        exponents: int8 ``[channels]``.
    """

    origin: str
    vectors: tuple[str, ...]
    readers: tuple[str, ...]
    exponents: Int8Array

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {
            "origin": self.origin,
            "vectors": list(self.vectors),
            "readers": list(self.readers),
            "exponents": base64.b64encode(self.exponents.tobytes()).decode(),
        }

    @staticmethod
    def from_json(value: Any) -> Fold:
        """Raises ValueError where it is not of this form."""
        if not isinstance(value, dict):
            raise ValueError("is no object")
        names = [value.get("origin"), *_list(value, "vectors"), *_list(value, "readers")]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names are not strings")
        try:
            raw = base64.b64decode(value["exponents"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error):
            raise ValueError("exponents are not base64") from None
        exponents = np.frombuffer(raw, dtype=np.int8)
        if np.abs(exponents.astype(np.int16)).max(initial=0) > LARGEST_EXPONENT:
            raise ValueError(f"exponents go beyond {LARGEST_EXPONENT}")
        return Fold(value["origin"], tuple(value["vectors"]), tuple(value["readers"]), exponents)


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise ValueError(f"{key} is no list")
    return found


@dataclass
class Folds:
    """All folds of an artifact, found by the tensors that they change."""

    _columns: dict[str, Int8Array] = field(default_factory=dict)
    _outputs: dict[str, Int8Array] = field(default_factory=dict)
    _all: dict[str, Fold] = field(default_factory=dict)

    def add(self, fold: Fold) -> None:
        """Add one fold; a second of the same origin takes its place."""
        self._all[fold.origin] = fold
        self._columns.update(dict.fromkeys(fold.readers, fold.exponents))
        self._outputs.update(dict.fromkeys((fold.origin, *fold.vectors), fold.exponents))

    def __contains__(self, name: object) -> bool:
        return name in self._columns or name in self._outputs

    def __iter__(self) -> Iterator[Fold]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor that is changed."""
        return frozenset(self._columns) | frozenset(self._outputs)

    def columns(self, name: str) -> Int8Array | None:
        """Exponents that a weight's columns are multiplied by."""
        return self._columns.get(name)

    def outputs(self, name: str) -> Int8Array | None:
        """Exponents that a weight's rows, or a vector, are divided by."""
        return self._outputs.get(name)

    def exponents(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int16] | None:
        """What a tensor's values are multiplied by, as exponents of two that broadcast to `shape`; None: nothing.

        Raises:
            CheckpointError: the fold has another number of channels.
        """
        columns, outputs = self._columns.get(name), self._outputs.get(name)
        total = np.zeros((1,) * len(shape), dtype=np.int16)
        for exponents, axis, sign in ((columns, -1, 1), (outputs, 0, -1)):
            if exponents is None:
                continue
            if not shape or exponents.size != shape[axis]:
                raise CheckpointError(
                    f"{FOLDS_NAME}: {name!r} is {list(shape)}, its fold has {exponents.size} channels"
                )
            width = [1] * len(shape)
            width[axis] = exponents.size
            total = total + sign * exponents.astype(np.int16).reshape(width)
        return None if columns is None and outputs is None else total

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"version": FOLDS_VERSION, "folds": [fold.to_json() for fold in self._all.values()]}


def read_folds(folder: Path) -> Folds:
    """The folds of an artifact; none where there is no file.

    Raises:
        CheckpointError: the file is damaged.
    """
    folds = Folds()
    path = folder / FOLDS_NAME
    if not path.is_file():
        return folds
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or value.get("version") != FOLDS_VERSION:
            raise ValueError(f"is not of version {FOLDS_VERSION}")
        for item in _list(value, "folds"):
            folds.add(Fold.from_json(item))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return folds


def scaled(values: npt.NDArray[np.float32], exponents: npt.NDArray[np.int16] | None) -> npt.NDArray[np.float32]:
    """Values times powers of two, exact in float32 unless the range is left."""
    return values if exponents is None else np.ldexp(values, exponents).astype(np.float32)
