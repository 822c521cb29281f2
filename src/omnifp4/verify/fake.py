"""Whether the weights of a fake-quant checkpoint are ones that NVFP4 can hold."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dtypes import NUMPY_DTYPES, WIDE_FLOATS
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E2M1_MAGNITUDES
from omnifp4.verify.findings import Findings
from omnifp4.verify.reading import Buffers, Meter, batches, in_threads
from omnifp4.verify.subject import Subject, is_readable

ROUNDING: Final = 2.0**-7
"""Room for the rounding of value and scale to BF16."""

PANEL_BLOCKS: Final = 1 << 16


def check_fake(subject: Subject, reader: CheckpointReader, threads: int, meter: Meter) -> Findings:
    """``fp4.fake``: every block of 16 lies on the grid of E2M1 under some scale."""
    found = Findings("fp4.fake", "fake-quant: every value is one that NVFP4 can hold", fix="quantize again")
    stated = (subject.receipt or {}).get("decisions")
    names = set(stated) if isinstance(stated, dict) else set()
    specs = [
        spec
        for spec in subject.layout.tensors
        if spec.is_linear and (spec.name in names if names else is_readable(spec))
    ]
    entries = [
        entry
        for spec in specs
        if (entry := subject.checkpoint.tensors.get(spec.name)) is not None
        and entry.dtype in WIDE_FLOATS
        and entry.shape[-1] % BLOCK_SIZE == 0
    ]
    if not entries:
        found.unchecked = "no linear was found that should be rounded"
        return found
    buffers = Buffers()

    def look(batch: list[TensorEntry]) -> list[str]:
        problems = []
        for entry in batch:
            off = _off_grid(entry, reader, buffers)
            meter.add(entry.nbytes, "values")
            if off:
                problems.append(f"{entry.name}: {off:,} of {entry.parameters // BLOCK_SIZE:,} blocks were not rounded")
        return problems

    for problems in in_threads(look, batches(entries, lambda entry: entry.nbytes), threads):
        for problem in problems:
            found.add(problem)
    found.passed = f"{len(entries):,} linears are rounded through NVFP4 and stored wide: nothing shrinks"
    found.failed = f"{found.count:,} of {len(entries):,} linears were not rounded through NVFP4"
    return found


def _off_grid(entry: TensorEntry, reader: CheckpointReader, buffers: Buffers) -> int:
    dtype = NUMPY_DTYPES[entry.dtype]
    step = PANEL_BLOCKS * BLOCK_SIZE * dtype.itemsize
    off = 0
    for start in range(0, entry.nbytes, step):
        raw = buffers.take("raw", min(step, entry.nbytes - start))
        reader.read_into(entry, raw, start)
        off += int(np.count_nonzero(~blocks_on_grid(_magnitudes(raw.view(dtype), entry.dtype))))
    return off


def _magnitudes(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        bits = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.abs(bits.astype(np.float32)).reshape(-1, BLOCK_SIZE)


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
