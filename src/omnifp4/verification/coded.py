"""The FP8, MXFP4 and INT8 linears of an artifact: their scales, and their codes beside the originals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects import CodedLinear
from omnifp4.checkpoint.dialects.coded import codes_from_disk, scale_from_disk
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats import coded
from omnifp4.formats.int8 import INT8_MAX
from omnifp4.formats.mxfp4 import E8M0_NAN, E8M0_VALUES
from omnifp4.formats.nvfp4 import E2M1_MAX, E4M3_MAX, ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.formats.widening import widen
from omnifp4.models.source import Source, SourceTensor
from omnifp4.verification.findings import Findings
from omnifp4.verification.panels import original_panels
from omnifp4.verification.reading import PANEL_BYTES, Buffers, Meter, batches, in_threads
from omnifp4.verification.scales import LARGEST_WEIGHT
from omnifp4.verification.subject import RECEIPT_NAME, Subject
from omnifp4.verification.values import (
    NOTED,
    RECEIPT_TOLERANCE,
    REFUSED,
    SAMPLE_ROWS,
    SourceNames,
    ValueResult,
    conclude,
)

AGAIN: Final = "quantize again: omnifp4 quantize MODEL OUT (repair mends NVFP4 alone)"

LARGEST_CODE: Final = {Scheme.FP8: E4M3_MAX, Scheme.INT8: INT8_MAX, Scheme.MXFP4: E2M1_MAX}
"""The largest value of a code, in units of its scale."""


def read_scale(linear: CodedLinear, reader: CheckpointReader) -> npt.NDArray[Any]:
    """The scales of a sound linear, as `formats.coded` has them."""
    assert linear.scale is not None
    return scale_from_disk(np.asarray(reader.read(linear.scale)), linear.scale.dtype)


def read_codes(linear: CodedLinear, first: int, count: int, reader: CheckpointReader) -> npt.NDArray[Any]:
    """Rows of codes of a sound linear, as `formats.coded` has them."""
    raw = np.empty(count * linear.code_bytes, dtype=np.uint8)
    reader.read_into(linear.codes, raw, first * linear.code_bytes)
    return codes_from_disk(raw.reshape(count, linear.code_bytes), linear.codes.dtype)


def check_coded_scales(
    subject: Subject, sound: set[str], reader: CheckpointReader, threads: int, meter: Meter
) -> Findings:
    """``scales.coded``: scales of FP8, MXFP4 and INT8 linears are numbers that a kernel can use, and FP8 codes are numbers."""
    found = Findings("scales.coded", "scales and codes of FP8, MXFP4 and INT8 are sound", fix=AGAIN)
    linears = [linear for module, linear in subject.coded.items() if module in sound]

    def look(batch: list[CodedLinear]) -> list[str]:
        return [problem for linear in batch for problem in _scale_problems(linear, reader, meter)]

    for problems in in_threads(look, batches(linears, lambda linear: linear.codes.nbytes), threads):
        for problem in problems:
            found.add(problem)
    found.passed = f"{len(linears):,} linears"
    found.failed = f"{found.count:,} tensors hold what no kernel can use"
    if len(linears) < len(subject.coded):
        found.unchecked = f"{len(subject.coded) - len(linears):,} linears lack a tensor or have one of the wrong form"
    return found


def _scale_problems(linear: CodedLinear, reader: CheckpointReader, meter: Meter) -> Iterator[str]:
    scale, entry = read_scale(linear, reader), linear.scale
    assert entry is not None
    if linear.scheme is Scheme.MXFP4:
        bad = int(np.count_nonzero(scale == E8M0_NAN))
        largest = float(E8M0_VALUES[scale[scale != E8M0_NAN]].max(initial=0.0))
    else:
        usable = np.isfinite(scale) & (scale > 0)
        bad = int(np.count_nonzero(~usable))
        largest = float(scale[usable].max(initial=0.0))
    if bad:
        yield f"{entry.name}: {bad:,} of {scale.size:,} scales are NaN, infinite, zero or negative"
    if largest * LARGEST_CODE[linear.scheme] > LARGEST_WEIGHT:
        yield f"{entry.name}: allows weights up to {largest * LARGEST_CODE[linear.scheme]:.3g}, which no trained model has"
    if linear.shape_note is not None:
        said = tuple(int(size) for size in np.asarray(reader.read(linear.shape_note)).reshape(-1))
        if said != linear.shape:
            yield f"{linear.shape_note.name}: says {list(said)}, the codes are of a weight of {list(linear.shape)}"
    if linear.scheme is Scheme.FP8:
        rows = linear.shape[0]
        step = max(1, PANEL_BYTES // linear.code_bytes)
        bad = sum(
            int(np.count_nonzero((read_codes(linear, first, min(step, rows - first), reader) & 0x7F) == 0x7F))
            for first in range(0, rows, step)
        )
        meter.add(linear.codes.nbytes, "scales")
        if bad:
            yield f"{linear.codes.name}: {bad:,} codes are NaN"


@dataclass(frozen=True, slots=True)
class _Compared:
    """One linear beside its original; `expected` is the relative squared error of the plain scale rule on some rows."""

    module: str
    squared_error: float
    energy: float
    max_abs_error: float
    expected: float
    other_codes: int
    other_scales: int

    @property
    def error(self) -> float:
        if not self.energy:
            return 0.0 if not self.squared_error else math.inf
        return self.squared_error / self.energy


def check_coded_values(
    subject: Subject,
    sound: set[str],
    source: Source,
    readers: tuple[CheckpointReader, CheckpointReader],
    threads: int,
    meter: Meter,
) -> ValueResult:
    """``values.coded``: every FP8, MXFP4 and INT8 linear is near its original; ours are what the formats' definition gives.

    Scales and codes are derived again by the reference. In an artifact of ours that no calibration touched, each must
    be the same.
    """
    found = Findings("values.coded", "FP8, MXFP4 and INT8 weights are what their originals become", fix=AGAIN)
    names = SourceNames(source)
    pairs = [
        (linear, original)
        for module, linear in subject.coded.items()
        if module in sound
        and (original := names.find(f"{module}.weight")) is not None
        and original.spec.shape == linear.shape
    ]
    if not pairs:
        found.unchecked = "none could be joined to an original"
        return ValueResult(found)
    rule, buffers = _stated_rule(subject), Buffers()

    def look(batch: list[tuple[CodedLinear, SourceTensor]]) -> list[_Compared]:
        return [_compare(linear, original, rule, readers, buffers, meter) for linear, original in batch]

    results = [
        result for batch in in_threads(look, batches(pairs, lambda p: p[0].codes.nbytes), threads) for result in batch
    ]
    _judge(found, subject, results, exact=rule is not None)
    energy = math.fsum(result.energy for result in results)
    squared_error = math.fsum(result.squared_error for result in results)
    found.passed = f"{len(results):,} linears, relative squared error {squared_error / max(energy, 1e-300):.3g}" + (
        ", every scale and code as the reference derives it" if rule is not None else ""
    )
    return conclude(found, results, len(subject.coded) - len(pairs), "FP8, MXFP4 and INT8 linears")


def _stated_rule(subject: Subject) -> ScaleRule | None:
    """The rule by which our own receipt says scales were chosen; None where another tool, or other data, chose them."""
    receipt = subject.receipt or {}
    if not isinstance(receipt.get("schemes"), dict) or receipt.get("calibration"):
        return None
    stated = receipt.get("rule")
    return ScaleRule(stated) if stated in tuple(ScaleRule) else None


def _compare(
    linear: CodedLinear,
    original: SourceTensor,
    rule: ScaleRule | None,
    readers: tuple[CheckpointReader, CheckpointReader],
    buffers: Buffers,
    meter: Meter,
) -> _Compared:
    scale = read_scale(linear, readers[0])
    error = energy = largest = expected = 0.0
    other_codes = other_scales = 0
    panels = original_panels(original, readers[1], buffers)
    for first, raw in (
        (start + rows.start, panel[rows]) for start, panel in panels for rows in coded.row_chunks(*panel.shape)
    ):
        wide = widen(raw, original.entry.dtype)
        codes = read_codes(linear, first, len(raw), readers[0])
        its = scale if scale.size == 1 else scale[first : first + len(raw)]
        with np.errstate(all="ignore"):
            decoded = coded.decode(coded.CodedTensor(linear.scheme, codes, its))
            stats = coded.error_of(wide, decoded)
            error += stats.squared_error if math.isfinite(stats.squared_error) else math.inf
            energy += stats.energy
            largest = max(largest, float(np.abs(wide - decoded).max(initial=0.0)))
            derived = coded.encode_codes(wide, linear.scheme, its) if rule is not None else codes
        other_codes += int(np.count_nonzero(derived != codes))
        if rule is not None and scale.size > 1:
            other_scales += int(np.count_nonzero(coded.choose_scales(wide, linear.scheme, rule) != its))
        if not first:
            expected = expected_coded_error(wide[:: max(1, len(raw) // SAMPLE_ROWS)][:SAMPLE_ROWS], linear.scheme)
        meter.add(raw.nbytes + codes.nbytes, "values")
    return _Compared(linear.module, error, energy, largest, expected, other_codes, other_scales)


def expected_coded_error(sample: npt.NDArray[np.float32], scheme: Scheme) -> float:
    """What the plain rule gives on these rows, never less than on Gaussian ones: an easy tensor proves nothing."""
    floor = coded.EXPECTED_RELATIVE_ERROR[scheme]
    try:
        stats = coded.error_of(sample, coded.decode(coded.encode(sample, scheme, ScaleRule.MAX)))
    except ValueError:
        return floor
    return max(floor, stats.squared_error / stats.energy) if stats.energy else floor


def _judge(found: Findings, subject: Subject, results: list[_Compared], *, exact: bool) -> None:
    stated = (subject.receipt or {}).get("decisions")
    recorded = stated if isinstance(stated, dict) else {}
    noted = 0
    for result in sorted(results, key=lambda result: -result.error):
        name = f"{result.module}.weight"
        scheme = subject.coded[result.module].scheme
        said = recorded.get(name)
        if not result.error <= REFUSED * result.expected:
            found.add(
                f"{name}: relative squared error {result.error:.3g}, {scheme} with the plain rule gives {result.expected:.3g}"
            )
        elif exact and (result.other_codes or result.other_scales):
            found.add(
                f"{name}: {result.other_scales:,} scales and {result.other_codes:,} codes are not what the reference derives "
                "from the original"
            )
        elif isinstance(said, int | float) and abs(result.error - said) > RECEIPT_TOLERANCE * max(said, 1e-12):
            found.add(f"{name}: relative squared error {result.error:.4g}, {RECEIPT_NAME} says {said:.4g}")
        elif not exact and result.error > NOTED * result.expected:
            noted += 1
    if noted:
        found.notes.append(
            f"{noted:,} err more than {NOTED} times as much as the plain rule, as calibrated methods may"
        )
    found.failed = f"{found.count:,} of {len(results):,} linears are not what their originals become"
