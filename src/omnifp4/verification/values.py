"""Every dequantized weight against its original, and every untouched tensor bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects import LinearEntries
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats.nvfp4 import BLOCK_SIZE, EXPECTED_RELATIVE_ERROR, ScaleRule
from omnifp4.formats.widening import widen
from omnifp4.models.source import Source, SourceTensor
from omnifp4.receipt.verification import TensorError
from omnifp4.verification.diagnosis import EXPLAINED, Suspect, diagnose
from omnifp4.verification.findings import Findings
from omnifp4.verification.folds import folded_panels
from omnifp4.verification.panels import read_rows
from omnifp4.verification.reading import Buffers, Meter, batches, in_threads
from omnifp4.verification.scales import ScaleValues
from omnifp4.verification.subject import RECEIPT_NAME, Subject

SAMPLE_ROWS: Final = 16
"""Rows encoded by plain max scaling, to know what this tensor's values allow."""

NOTED: Final = 1.5
"""Times the error of max scaling from where on it is said: methods that calibrate trade weight error for output error."""

REFUSED: Final = 4.0
"""Times the error of max scaling from where on the weights are taken for damaged. AWQ and GPTQ stay below 3."""

MOST_OF_GPTQ: Final = 0.25
LITTLE_DAMPING: Final = 0.01
"""Relative squared error up to which weights that GPTQ rounded with less damping are what they should be, if our own receipt
states that error: the columns of inputs that tokens hardly tell apart make up for each other, the more so the less it is
damped. With the recipe's 0.03 and 64 tokens for 2,048 inputs it is 0.011, where rounding to the nearest errs by 0.009."""

RECEIPT_TOLERANCE: Final = 0.01
"""How far a tensor's error may be from what our own receipt says: float32 sums in another order."""

MOST_WORST: Final = 12
MOST_DIAGNOSED: Final = 12

REQUANTIZE: Final = "omnifp4 repair IN OUT --source WIDE recomputes damaged tensors"


@dataclass(frozen=True, slots=True)
class Compared:
    """One linear beside its original.

    Attributes:
        expected: relative squared error of max scaling on a sample of its rows.
        swapped: relative squared error if the two codes of every byte changed places.
    """

    module: str
    squared_error: float
    energy: float
    max_abs_error: float
    expected: float
    swapped: float
    nonfinite: int

    @property
    def error(self) -> float:
        """Relative squared error."""
        if not self.energy:
            return 0.0 if not self.squared_error else math.inf
        return self.squared_error / self.energy


@dataclass
class ValueResult:
    """What the comparison gave.

    Attributes:
        error: of all linears together; None if none was compared.
        worst: the largest errors first.
        squared_error, energy: of all together.
    """

    findings: Findings
    error: float | None = None
    worst: tuple[TensorError, ...] = field(default=())
    squared_error: float = 0.0
    energy: float = 0.0


class SourceNames:
    """Finds originals: an artifact of the thinker alone may have dropped the prefix that the whole model has."""

    def __init__(self, source: Source) -> None:
        """`source`: the wide checkpoint."""
        self._tensors: Mapping[str, SourceTensor] = {tensor.spec.name: tensor for tensor in source.tensors}

    def find(self, name: str) -> SourceTensor | None:
        """The original of a tensor of the artifact."""
        for candidate in (name, f"thinker.{name}", name.removeprefix("thinker.")):
            if candidate in self._tensors:
                return self._tensors[candidate]
        return None


def check_values(
    subject: Subject,
    sound: set[str],
    scales: ScaleValues,
    source: Source,
    readers: tuple[CheckpointReader, CheckpointReader],
    threads: int,
    meter: Meter,
) -> ValueResult:
    """``values.error``: each dequantized linear against what its original and the format allow."""
    found = Findings("values.error", "dequantized weights are near their originals", fix=REQUANTIZE)
    names = SourceNames(source)
    pairs: list[tuple[LinearEntries, SourceTensor]] = []
    for module, linear in subject.fp4.items():
        original = names.find(f"{module}.weight")
        if original is not None and module in sound:
            rows, half = linear.packed.shape
            if original.spec.shape == (rows, 2 * half):
                pairs.append((linear, original))
    left_out = len(subject.fp4) - len(pairs)
    if not pairs:
        found.unchecked = "no FP4 linear could be joined to an original"
        return ValueResult(found)
    compare = _comparer(subject, scales, readers, Buffers(), meter)
    results: list[Compared] = []
    groups = batches(pairs, lambda pair: pair[0].packed.nbytes * 4)
    for batch in in_threads(lambda items: [compare(*item) for item in items], groups, threads):
        results += batch
    _judge(found, subject, results, names, readers)
    energy = math.fsum(result.energy for result in results)
    squared_error = math.fsum(result.squared_error for result in results)
    error = squared_error / energy if energy else 0.0
    found.passed = (
        f"{len(results):,} linears, relative squared error {error:.3g} "
        f"(max scaling gives {EXPECTED_RELATIVE_ERROR[ScaleRule.MAX]:.3g}, the worst here is {max(result.error for result in results):.3g})"
    )
    return conclude(found, results, left_out, "FP4 linears")


class Measured(Protocol):
    """One linear beside its original."""

    @property
    def module(self) -> str: ...
    @property
    def squared_error(self) -> float: ...
    @property
    def energy(self) -> float: ...
    @property
    def max_abs_error(self) -> float: ...
    @property
    def error(self) -> float: ...


def conclude(found: Findings, results: Sequence[Measured], left_out: int, kind: str) -> ValueResult:
    """Sums over linears. Those that could not be compared turn a pass into "not checked".

    Args:
        found: with what it says if it passes.
        results: of the linears that were compared.
        left_out: how many others there are.
        kind: what they are called.
    """
    if left_out:
        found.notes.append(f"{left_out:,} {kind} could not be joined to an original and were not compared")
        if not found.count:
            found.unchecked = found.passed
    energy = math.fsum(result.energy for result in results)
    squared_error = math.fsum(result.squared_error for result in results)
    error = squared_error / energy if energy else 0.0
    worst = sorted(results, key=lambda result: -result.error)[:MOST_WORST]
    return ValueResult(
        found,
        error if math.isfinite(error) else None,
        tuple(
            TensorError(
                name=f"{result.module}.weight",
                relative_squared_error=finite(result.error),
                max_abs_error=finite(result.max_abs_error),
            )
            for result in worst
        ),
        squared_error,
        energy,
    )


def finite(value: float) -> float:
    """For the receipt, which is JSON and knows no infinity; NaN becomes the largest number too."""
    return value if math.isfinite(value) else float(np.finfo(np.float64).max)


def _comparer(
    subject: Subject,
    scales: ScaleValues,
    readers: tuple[CheckpointReader, CheckpointReader],
    buffers: Buffers,
    meter: Meter,
) -> Callable[[LinearEntries, SourceTensor], Compared]:
    from omnifp4.formats import fast_cpu  # Numba takes a moment, and only this check needs it.

    artifact, source = readers

    def compare(linear: LinearEntries, original: SourceTensor) -> Compared:
        assert linear.block_scale is not None
        half = linear.packed.shape[1]
        tensor_scale = scales.tensor[linear.module]
        error = energy = swapped = largest = 0.0
        nonfinite, expected = 0, 0.0
        branch = _branch(linear, artifact)
        for first, panel, dtype in folded_panels(subject, f"{linear.module}.weight", original, source, buffers):
            raw, count = panel, len(panel)
            if not first:
                sample = raw[:: max(1, count // SAMPLE_ROWS)][:SAMPLE_ROWS]
                expected = _expected_error(fast_cpu.encode, sample, dtype)
            if branch is not None:
                # The codes stand for what the branch leaves over; the energy is that of the whole weight.
                whole = widen(panel, dtype)
                energy += float(np.square(whole, dtype=np.float64).sum())
                raw, dtype = whole - branch[0][first : first + count] @ branch[1], "F32"
            packed = read_rows(artifact, linear.packed, first, count, half, buffers, "packed")
            block = read_rows(artifact, linear.block_scale, first, count, 2 * half // BLOCK_SIZE, buffers, "block")
            with np.errstate(all="ignore"):
                stats = fast_cpu.compare(raw, dtype, packed, block, tensor_scale, linear.reciprocal)
            error += stats.squared_error
            energy += 0.0 if branch is not None else stats.energy
            swapped += stats.swapped_squared_error
            largest = max(largest, stats.max_abs_error)
            nonfinite += stats.nonfinite
            meter.add(raw.nbytes + packed.nbytes + block.nbytes, "values")
        with np.errstate(all="ignore"):
            relative_swap = float(np.float64(swapped) / np.float64(energy)) if energy else math.inf
        return Compared(linear.module, error, energy, largest, expected, relative_swap, nonfinite)

    return compare


def _branch(
    linear: LinearEntries, reader: CheckpointReader
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """The low-rank part beside a linear: up ``[out, r]`` and down ``[r, in]``."""
    if linear.branch is None:
        return None
    up, down = (widen(reader.read(entry), entry.dtype) for entry in linear.branch)
    return up, down


def _expected_error(encode: Callable[..., Any], sample: npt.NDArray[Any], dtype: str) -> float:
    """What max scaling gives on these rows, never less than on Gaussian ones: an easy tensor proves nothing."""
    floor = EXPECTED_RELATIVE_ERROR[ScaleRule.MAX]
    try:
        _, stats = encode(sample, dtype, ScaleRule.MAX)
    except ValueError:
        return floor
    return max(floor, stats.squared_error / stats.energy) if stats.energy else floor


def is_stated_of_gptq(subject: Subject, name: str, error: float) -> bool:
    """Whether a large error of a weight is the one that GPTQ made, as our own receipt tells."""
    receipt: Mapping[str, Any] = subject.receipt or {}
    stated, use = receipt.get("decisions"), receipt.get("calibration")
    said = stated.get(name) if isinstance(stated, dict) and subject.method == "gptq" else None
    method = use.get("method") if isinstance(use, dict) else None
    damping = method.get("damping") if isinstance(method, dict) else None
    if not isinstance(said, int | float) or not isinstance(damping, int | float) or damping >= LITTLE_DAMPING:
        return False
    return error <= MOST_OF_GPTQ and abs(error - said) <= RECEIPT_TOLERANCE * said


def _judge(
    found: Findings,
    subject: Subject,
    results: list[Compared],
    names: SourceNames,
    readers: tuple[CheckpointReader, CheckpointReader],
) -> None:
    stated = (subject.receipt or {}).get("decisions")
    recorded = stated if isinstance(stated, dict) else {}
    bad = [
        r
        for r in results
        if r.nonfinite
        or not (r.error <= REFUSED * r.expected or is_stated_of_gptq(subject, f"{r.module}.weight", r.error))
    ]
    bad.sort(key=lambda r: (-r.nonfinite, -r.error))
    swapped = 0
    for number, result in enumerate(bad):
        name = f"{result.module}.weight"
        if result.nonfinite:
            found.add(f"{name}: {result.nonfinite:,} values are NaN or infinite, here or in the original")
            continue
        reason = ""
        if result.swapped < EXPLAINED * result.expected:
            swapped += 1
            reason = ": the two codes of every byte are swapped"
        elif number < MOST_DIAGNOSED:
            suspect = Suspect(subject.linears[result.module], result.expected)
            reason = diagnose(suspect, names.find, subject, readers)
        found.add(f"{name}: relative squared error {result.error:.3g}, max scaling gives {result.expected:.3g}{reason}")
    refused = {result.module for result in bad}
    for result in results:
        said = recorded.get(f"{result.module}.weight")
        if not isinstance(said, int | float) or result.module in refused:
            continue
        if abs(result.error - said) > RECEIPT_TOLERANCE * max(said, 1e-12):
            found.add(
                f"{result.module}.weight: relative squared error {result.error:.4g}, {RECEIPT_NAME} says {said:.4g}"
            )
    if swapped:
        found.notes.append(f"{swapped:,} have the two codes of every byte swapped")
    noted = sum(result.error > NOTED * result.expected for result in results) - len(bad)
    if noted > 0:
        found.notes.append(f"{noted:,} err more than {NOTED} times as much as max scaling, as calibrated methods may")
    found.failed = f"{found.count:,} of {len(results):,} linears are not what their originals become"
