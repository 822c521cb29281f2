"""Factors that were folded away: whether they cancel, and what the originals are once they are applied."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.folds import FOLDS_NAME, scaled
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.formats.widening import widen
from omnifp4.models import TensorSpec
from omnifp4.models.source import SourceTensor
from omnifp4.verification.findings import Findings
from omnifp4.verification.panels import original_panels
from omnifp4.verification.reading import Buffers
from omnifp4.verification.subject import Subject

NORM: Final = re.compile(r"(?P<layer>.*layers\.\d+)\.(?P<norm>input_layernorm|post_attention_layernorm)\.weight")
UP: Final = ".up_proj.weight"


def check_folds(subject: Subject) -> Findings | None:
    """``folds``: whoever reads scaled channels has the inverse, and nobody else; None where nothing was folded.

    With the same powers of two on both sides the model computes what it did before it was rounded.
    """
    folds = subject.folds
    if not len(folds):
        return None
    found = Findings("folds", "folded factors cancel out", fix="quantize again")
    names = subject.layout.by_name
    for fold in folds:
        wanted = _readers(subject, fold.origin)
        if wanted is None or fold.origin not in names:
            found.add(f"{fold.origin}: nothing can be folded into it in a {subject.layout.model_type}")
            continue
        others = set(wanted) ^ set(fold.readers)
        if others:
            found.add(f"{fold.origin}: its readers are not those that the fold names, as with {sorted(others)[0]!r}")
        if set(fold.vectors) != _vectors(subject, fold.origin):
            found.add(f"{fold.origin}: its bias is not in the fold")
        channels = names[fold.origin].shape[0]
        wrong = [reader for reader in wanted if names[reader].shape[1] != fold.exponents.size]
        if channels != fold.exponents.size or wrong:
            found.add(f"{fold.origin}: {fold.exponents.size} factors for {channels} channels")
    found.passed = f"{len(folds):,} sets of factors: whoever reads such channels has the inverse"
    found.failed = f"{found.count:,} findings in {FOLDS_NAME}: the model would not compute what it did"
    return found


def _readers(subject: Subject, origin: str) -> list[str] | None:
    """Every weight that reads what `origin` makes; None where that is not known."""
    linears = {spec.name: spec for spec in subject.layout.tensors if spec.is_linear}
    if origin.endswith(UP):
        down = origin.removesuffix(UP) + ".down_proj.weight"
        return [down] if down in linears else None
    match = NORM.fullmatch(origin)
    if match is None:
        return None
    inside = f"{match['layer']}.{'self_attn' if match['norm'] == 'input_layernorm' else 'mlp'}."
    last = (".o_proj.weight", ".down_proj.weight")
    return [name for name in linears if name.startswith(inside) and not name.endswith(last)]


def _vectors(subject: Subject, origin: str) -> set[str]:
    bias = origin.removesuffix(".weight") + ".bias"
    spec: TensorSpec | None = subject.layout.by_name.get(bias)
    return {bias} if spec is not None and bias in subject.checkpoint.tensors else set()


def folded_panels(
    subject: Subject, name: str, original: SourceTensor, reader: CheckpointReader, buffers: Buffers
) -> Iterator[tuple[int, npt.NDArray[Any], str]]:
    """An original a few rows at a time, with the folds of the artifact's tensor `name` applied: row, values, dtype."""
    exponents = subject.folds.exponents(name, original.spec.shape)
    for first, raw in original_panels(original, reader, buffers):
        if exponents is None:
            yield first, raw, original.entry.dtype
            continue
        part = exponents if exponents.shape[0] == 1 else exponents[first : first + len(raw)]
        yield first, scaled(widen(raw, original.entry.dtype), part), "F32"


def folded_difference(subject: Subject, name: str, dtype: str, mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> str:
    """Why a wide tensor is not its original with its folds applied; empty if it is, to the bit.

    Raises:
        CheckpointError: the fold has another number of channels.
    """
    exponents = subject.folds.exponents(name, mine.shape)
    if mine.shape != theirs.shape:
        raise CheckpointError(f"{name}: shape {list(mine.shape)}, in the source {list(theirs.shape)}")
    wanted = scaled(widen(theirs, dtype), exponents)
    differs = np.flatnonzero(widen(mine, dtype).reshape(-1) != wanted.reshape(-1))
    if differs.size:
        return f"{name}: differs from the source with its fold undone, first at element {int(differs[0]):,}"
    return ""
