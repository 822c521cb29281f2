"""Whether the weights of a fake-quant checkpoint are ones that NVFP4 can hold."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import NUMPY_DTYPES, WIDE_FLOATS
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import OmniFP4Error
from omnifp4.formats import coded, int8
from omnifp4.formats.coded import CODED_SCHEMES
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E2M1_MAGNITUDES, EXPECTED_RELATIVE_ERROR, ScaleRule
from omnifp4.formats.scheme import Scheme
from omnifp4.models import Part
from omnifp4.models.source import Source, SourceTensor, match_source
from omnifp4.receipt.verification import TensorError
from omnifp4.verification.coded import expected_coded_error
from omnifp4.verification.findings import Findings
from omnifp4.verification.folds import folded_panels
from omnifp4.verification.panels import original_panels
from omnifp4.verification.reading import Buffers, Meter, batches, in_threads
from omnifp4.verification.subject import Subject, is_readable
from omnifp4.verification.values import (
    MOST_WORST,
    REFUSED,
    SAMPLE_ROWS,
    SourceNames,
    ValueResult,
    finite,
    is_stated_of_gptq,
)

ROUNDING: Final = 2.0**-7
"""Room for the rounding of value and scale to BF16."""


OFF_GRID: Final = 0.1
"""Share of a scheme's own error that a second rounding may show; weights that were never rounded show most of it."""

OFF_INTEGERS: Final = 0.03
"""Mean squared distance to a whole number, in units of INT8's scale: 1/12 where nothing was rounded, and at most a few
thousandths for values that were then rounded to BF16."""


def rounded_tensors(subject: Subject) -> list[SourceTensor]:
    """The weights that a fake-quant checkpoint should have rounded: those its receipt names, or the default recipe's."""
    try:
        inside = {tensor.spec.name: tensor for tensor in match_source(subject.checkpoint).tensors if tensor.fused}
    except OmniFP4Error:
        # Another check tells what is wrong with the tensors; here it hides those inside fused ones.
        inside = {}
    stated = (subject.receipt or {}).get("decisions")
    names = set(stated) if isinstance(stated, dict) else set()
    found = []
    for spec in subject.layout.tensors:
        default = is_readable(spec) and spec.component.part is Part.THINKER
        entry = subject.checkpoint.tensors.get(spec.name)
        tensor = inside.get(spec.name) if entry is None else SourceTensor(spec, entry)
        if tensor is None or not spec.is_linear or not (spec.name in names if names else default):
            continue
        is_whole = tensor.fused is not None or tensor.entry.shape == spec.shape
        multiple = rounded_scheme(subject, spec.name).width_multiple
        if tensor.entry.dtype in WIDE_FLOATS and is_whole and spec.shape[-1] % multiple == 0:
            found.append(tensor)
    return found


def rounded_scheme(subject: Subject, name: str) -> Scheme:
    """The scheme through which the receipt says a weight was rounded; NVFP4 where it says nothing."""
    stated = (subject.receipt or {}).get("schemes")
    value = stated.get(name) if isinstance(stated, dict) else None
    return Scheme(value) if value in (*CODED_SCHEMES,) else Scheme.NVFP4


def check_fake(subject: Subject, reader: CheckpointReader, threads: int, meter: Meter) -> Findings:
    """``fp4.fake``: every block of 16 lies on the grid of E2M1 under some scale, and the like for the other schemes."""
    found = Findings("fp4.fake", "fake-quant: every value is one that its scheme can hold", fix="quantize again")
    tensors = rounded_tensors(subject)
    if not tensors:
        found.unchecked = "no linear was found that should be rounded"
        return found
    if subject.method == "svdquant":
        found.unchecked = "a low-rank branch was added to each rounded weight, so none lies on a grid"
        return found
    buffers = Buffers()

    def look(batch: list[SourceTensor]) -> list[str]:
        problems = []
        for tensor in batch:
            scheme = rounded_scheme(subject, tensor.spec.name)
            meter.add(tensor.nbytes, "values")
            if scheme is not Scheme.NVFP4:
                if not _is_on_coded_grid(tensor, scheme, reader, buffers):
                    problems.append(f"{tensor.spec.name}: its values are not those of {scheme}: they were not rounded")
                continue
            off, blocks = _off_grid(tensor, reader, buffers), tensor.spec.parameters // BLOCK_SIZE
            if off:
                problems.append(f"{tensor.spec.name}: {off:,} of {blocks:,} blocks were not rounded")
        return problems

    for problems in in_threads(look, batches(tensors, lambda tensor: tensor.nbytes), threads):
        for problem in problems:
            found.add(problem)
    schemes = dict.fromkeys(rounded_scheme(subject, tensor.spec.name).value.upper() for tensor in tensors)
    through = ", ".join(schemes)
    found.passed = f"{len(tensors):,} linears are rounded through {through} and stored wide: nothing shrinks"
    found.failed = f"{found.count:,} of {len(tensors):,} linears were not rounded through {through}"
    return found


def check_fake_values(
    subject: Subject, source: Source, readers: tuple[CheckpointReader, CheckpointReader], threads: int, meter: Meter
) -> ValueResult:
    """``values.error`` of a fake-quant checkpoint: each rounded weight against what the format allows."""
    found = Findings("values.error", "rounded weights are near their originals", fix="quantize again")
    names, buffers = SourceNames(source), Buffers()
    bound = REFUSED * EXPECTED_RELATIVE_ERROR[ScaleRule.MAX]
    pairs = [
        (tensor, original)
        for tensor in rounded_tensors(subject)
        if (original := names.find(tensor.spec.name)) is not None and original.spec.shape == tensor.spec.shape
    ]

    bounds: dict[str, float] = {}

    def look(pair: tuple[SourceTensor, SourceTensor]) -> tuple[str, float, float, float]:
        tensor, original = pair
        scheme = rounded_scheme(subject, tensor.spec.name)
        error = energy = largest = 0.0
        dtype = tensor.entry.dtype
        whole = None if tensor.rows_divide else tensor.read(readers[0])
        for first, raw, form in folded_panels(subject, tensor.spec.name, original, readers[1], buffers):
            rows = len(raw)
            if whole is None:
                space = buffers.take("mine", raw.size * NUMPY_DTYPES[dtype].itemsize)
                mine = tensor.read_rows(readers[0], first, first + rows, space).reshape(-1)
            else:
                mine = whole[first : first + rows].reshape(-1)
            wide = widened(raw, form).reshape(-1)
            if not first and scheme is not Scheme.NVFP4:
                sample = widened(raw, form)[:: max(1, rows // SAMPLE_ROWS)][:SAMPLE_ROWS]
                bounds[tensor.spec.name] = REFUSED * expected_coded_error(sample, scheme)
            with np.errstate(all="ignore"):
                difference = (widened(mine, dtype) - wide).astype(np.float64)
                error += float(difference @ difference)
                energy += float(np.square(wide, dtype=np.float64).sum())
                largest = max(largest, float(np.abs(difference).max(initial=0.0)))
            meter.add(2 * raw.nbytes, "values")
        return tensor.spec.name, error, energy, largest

    results = list(in_threads(look, pairs, threads))
    errors = {name: error / energy if energy else (math.inf if error else 0.0) for name, error, energy, _ in results}
    for name, error in errors.items():
        if not (error <= bounds.get(name, bound) or is_stated_of_gptq(subject, name, error)):
            found.add(f"{name}: relative squared error {error:.3g}")
    energy = math.fsum(result[2] for result in results)
    total = math.fsum(result[1] for result in results) / energy if energy else 0.0
    found.passed = f"{len(results):,} linears, relative squared error {total:.3g}"
    found.failed = f"{found.count:,} of {len(results):,} linears are not what their originals become"
    if not results:
        found.unchecked = "no rounded linear could be joined to an original"
    worst = sorted(results, key=lambda result: -errors[result[0]])[:MOST_WORST]
    return ValueResult(
        found,
        total if results and math.isfinite(total) else None,
        tuple(
            TensorError(name=name, relative_squared_error=finite(errors[name]), max_abs_error=finite(largest))
            for name, _, _, largest in worst
        ),
        math.fsum(result[1] for result in results),
        energy,
    )


def _off_grid(tensor: SourceTensor, reader: CheckpointReader, buffers: Buffers) -> int:
    off = 0
    for _, raw in original_panels(tensor, reader, buffers):
        off += int(np.count_nonzero(~blocks_on_grid(_magnitudes(raw, tensor.entry.dtype))))
    return off


def _is_on_coded_grid(tensor: SourceTensor, scheme: Scheme, reader: CheckpointReader, buffers: Buffers) -> bool:
    """Whether encoding once more, under scales that the values themselves give, changes next to nothing."""
    error = energy = 0.0
    for _, raw in original_panels(tensor, reader, buffers):
        wide = widened(raw, tensor.entry.dtype)
        with np.errstate(all="ignore"):
            if not np.isfinite(wide).all():
                return False
            if scheme is Scheme.INT8:
                error += _off_integers(wide)
                energy += wide.size
                continue
            errors = [
                coded.error_of(wide, coded.decode(coded.encode(wide, scheme, rule)))
                for rule in (ScaleRule.MAX, ScaleRule.SWEEP)
            ]
        error += min(stats.squared_error for stats in errors)
        energy += errors[0].energy
    if scheme is Scheme.INT8:
        return error <= OFF_INTEGERS * energy
    return error <= OFF_GRID * coded.EXPECTED_RELATIVE_ERROR[scheme] * energy


def _off_integers(wide: npt.NDArray[np.float32]) -> float:
    """Squared distances to whole multiples of each row's scale, summed: the best of three neighbouring BF16 scales."""
    scale = int8.choose_scales(wide, ScaleRule.MAX)
    bits = scale.view(np.uint32) >> np.uint32(16)
    best = np.full(len(wide), np.inf)
    for step in (-1, 0, 1):
        near = ((bits.astype(np.int64) + step).astype(np.uint32) << np.uint32(16)).view(np.float32)
        units = wide / near[:, None]
        best = np.minimum(best, np.square(units - np.rint(units), dtype=np.float64).sum(axis=1))
    return float(best.sum())


def _magnitudes(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    return np.abs(widened(bits, dtype)).reshape(-1, BLOCK_SIZE)


def widened(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Bits of a wide float as float32."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32)


def blocks_on_grid(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether each row of magnitudes ``[n, 16]`` is a multiple of E2M1 magnitudes, up to BF16 rounding: bool ``[n]``."""
    largest = blocks.max(axis=1)
    fits: npt.NDArray[np.bool_] = largest == 0
    with np.errstate(all="ignore"):
        for top in E2M1_MAGNITUDES[:0:-1]:
            open_rows = np.flatnonzero(~fits)
            if not open_rows.size:
                break
            scaled = blocks[open_rows] * (top / largest[open_rows])[:, None]
            nearest = E2M1_MAGNITUDES[np.searchsorted(_MIDPOINTS, scaled)]
            fits[open_rows] = (np.abs(scaled - nearest) <= ROUNDING * nearest).all(axis=1)
    return fits


_MIDPOINTS: Final = (E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2
