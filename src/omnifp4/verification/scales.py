"""Whether every scale is a number that a kernel can use, and whether fused linears agree on theirs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.dialects import Activations, LinearEntries
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_VALUES
from omnifp4.verification.findings import Findings
from omnifp4.verification.reading import Buffers, Meter, batches, in_threads, read_scalars
from omnifp4.verification.subject import Subject

NAN_BITS: Final = 0x7F

LARGEST_WEIGHT: Final = 1e5
"""No weight of a trained model is larger. A factor stored where a divisor belongs gives 7e7 or more."""

SMALLEST_LARGEST_WEIGHT: Final = 1e-15
"""A linear whose largest weight is smaller than this does nothing; uninitialised divisors of 1e30 give that."""

ABOVE_SIBLINGS: Final = 1000.0
"""The largest weight of a linear over the median of its like in other layers and experts. Real ones differ by ten or so;
a tensor scale that a loader forgot to apply gives 2688."""

LARGEST_INPUT: Final = 1e8
SMALLEST_INPUT: Final = 1e-12

RECOMPUTE: Final = "omnifp4 repair IN OUT --source WIDE recomputes damaged scales"
RECONCILE: Final = "omnifp4 repair IN OUT reconciles the scales of fused linears"


@dataclass(frozen=True, slots=True)
class BlockScales:
    """What the bytes of a block scale are.

    Attributes:
        nan: blocks whose scale is NaN.
        negative: blocks whose scale has its sign bit set.
        zero: blocks whose scale is zero though a code in them is not.
        empty: blocks whose scale is zero and whose codes all are.
        largest: the largest finite scale.
    """

    nan: int
    negative: int
    zero: int
    empty: int
    largest: float


@dataclass(frozen=True)
class ScaleValues:
    """Every scale of every sound linear.

    Attributes:
        blocks: by module.
        tensor: tensor scales as stored, by module.
        inputs: input scales as stored, by module.
    """

    blocks: Mapping[str, BlockScales]
    tensor: Mapping[str, np.float32]
    inputs: Mapping[str, np.float32]


def read_scales(subject: Subject, sound: set[str], reader: CheckpointReader, threads: int, meter: Meter) -> ScaleValues:
    """Read all scales of sound linears; codes only where a block scale is zero."""
    linears = [linear for module, linear in subject.fp4.items() if module in sound]
    buffers = Buffers()

    def look(batch: list[LinearEntries]) -> list[tuple[str, BlockScales]]:
        return [(linear.module, _look_at_blocks(linear, reader, buffers, meter)) for linear in batch]

    groups = batches(linears, _block_scale_bytes)
    blocks = dict(pair for pairs in in_threads(look, groups, threads) for pair in pairs)
    scalars = read_scalars(reader, [s for li in linears for s in (li.tensor_scale, li.input_scale) if s is not None])
    return ScaleValues(
        blocks,
        {li.module: scalars[li.tensor_scale.name] for li in linears if li.tensor_scale is not None},
        {li.module: scalars[li.input_scale.name] for li in linears if li.input_scale is not None},
    )


def _block_scale_bytes(linear: LinearEntries) -> int:
    return linear.block_scale.nbytes if linear.block_scale is not None else 0


def _look_at_blocks(linear: LinearEntries, reader: CheckpointReader, buffers: Buffers, meter: Meter) -> BlockScales:
    entry = linear.block_scale
    if entry is None or not entry.nbytes:
        return BlockScales(0, 0, 0, 0, 0.0)
    scales = buffers.take("block_scale", entry.nbytes)
    reader.read_into(entry, scales)
    meter.add(entry.nbytes, "scales")
    highest, lowest = int(scales.max()), int(scales.min())
    if highest < NAN_BITS and lowest > 0:
        return BlockScales(0, 0, 0, 0, float(E4M3_VALUES[highest]))
    magnitude = scales & 0x7F
    is_nan, is_zero = magnitude == NAN_BITS, magnitude == 0
    negative = int(np.count_nonzero((scales > 0x80) & ~is_nan))
    usable = magnitude[~is_nan]
    filled = empty = 0
    if is_zero.any():
        filled, empty = _count_filled(linear, is_zero, reader)
    largest = float(E4M3_VALUES[int(usable.max())]) if usable.size else 0.0
    return BlockScales(int(np.count_nonzero(is_nan)), negative, filled, empty, largest)


def _count_filled(linear: LinearEntries, zero: npt.NDArray[np.bool_], reader: CheckpointReader) -> tuple[int, int]:
    """Of the blocks with a zero scale, how many have a code that is not zero, and how many have none."""
    block_bytes = BLOCK_SIZE // 2
    step = (4 << 20) // block_bytes
    filled = 0
    for start in range(0, zero.size, step):
        part = zero[start : start + step]
        if part.any():
            codes = np.empty(part.size * block_bytes, dtype=np.uint8)
            reader.read_into(linear.packed, codes, start * block_bytes)
            # The sign bit of a zero code makes it no less zero.
            has_value = (codes.reshape(-1, block_bytes) & 0x77).any(axis=1)
            filled += int(np.count_nonzero(part & has_value))
    return filled, int(np.count_nonzero(zero)) - filled


def check_finite(subject: Subject, values: ScaleValues) -> Findings:
    """``scales.finite``: no NaN, no infinity, no negative scale, no zero over values."""
    found = Findings("scales.finite", "every scale is finite and positive", fix=RECOMPUTE)
    if not values.blocks:
        found.unchecked = "there are no NVFP4 scales to look at"
        return found
    empty = 0
    for module, blocks in values.blocks.items():
        name = _name_of(subject, module, "block_scale")
        for count, what in (
            (blocks.nan, "are NaN"),
            (blocks.negative, "are negative"),
            (blocks.zero, "are zero over values that are not"),
        ):
            if count:
                found.add(f"{name}: {count:,} block scales {what}")
        empty += blocks.empty
    for role, scales in (("tensor_scale", values.tensor), ("input_scale", values.inputs)):
        for module, value in scales.items():
            if not math.isfinite(value) or not value > 0:
                found.add(f"{_name_of(subject, module, role)}: {role.replace('_', ' ')} is {value:g}")
            elif not _is_invertible(value, subject.linears[module].reciprocal):
                found.add(
                    f"{_name_of(subject, module, role)}: {role.replace('_', ' ')} {value:g} has no finite reciprocal"
                )
    found.passed = (
        f"block scales of {len(values.blocks):,} linears, and {len(values.tensor) + len(values.inputs):,} others"
    )
    found.failed = f"{found.count:,} tensors have scales that no kernel can use"
    if empty:
        found.notes.append(f"{empty:,} blocks with a zero scale have no values either, which is harmless here")
    return found


def _is_invertible(value: np.float32, reciprocal: bool) -> bool:
    return not reciprocal or bool(float(value) > 1 / float(np.finfo(np.float32).max))


def check_plausible(subject: Subject, values: ScaleValues) -> Findings:
    """``scales.plausible``: the largest weight that the scales allow is one that a trained model could have."""
    found = Findings("scales.plausible", "scales give weights of a sane size", fix=RECOMPUTE)
    largest = {
        module: E2M1_MAX * blocks.largest * factor
        for module, blocks in values.blocks.items()
        if (factor := _factor(subject, module, values.tensor.get(module))) is not None
    }
    if not largest:
        found.unchecked = "there are no usable NVFP4 scales to look at"
        return found
    medians = _medians(subject, largest)
    for module, value in largest.items():
        name = _name_of(subject, module, "tensor_scale")
        if value > LARGEST_WEIGHT:
            found.add(f"{name}: allows weights up to {value:.3g}; uninitialised, or a factor where a divisor belongs")
        elif 0 < value < SMALLEST_LARGEST_WEIGHT:
            found.add(
                f"{name}: allows weights up to {value:.3g} only; uninitialised, or a divisor where a factor belongs"
            )
        elif value > ABOVE_SIBLINGS * (median := medians[_kind_of(subject, module)]):
            found.add(f"{name}: allows weights up to {value:.3g}, {value / median:,.0f} times the median of its like")
    for module, stored in values.inputs.items():
        factor = _factor(subject, module, stored)
        if factor is not None and not SMALLEST_INPUT < factor * E2M1_MAX * E4M3_MAX < LARGEST_INPUT:
            found.add(
                f"{_name_of(subject, module, 'input_scale')}: allows inputs up to {factor * E2M1_MAX * E4M3_MAX:.3g}"
            )
    found.passed = f"largest weights from {min(largest.values()):.3g} to {max(largest.values()):.3g}"
    found.failed = f"{found.count:,} scales cannot be those of trained weights"
    return found


def _factor(subject: Subject, module: str, stored: np.float32 | None) -> float | None:
    """The tensor scale as a factor, None where it is unusable."""
    if stored is None or not math.isfinite(stored) or not stored > 0:
        return None
    return 1.0 / float(stored) if subject.linears[module].reciprocal else float(stored)


def _kind_of(subject: Subject, module: str) -> tuple[str, str]:
    spec = subject.layout.by_name.get(f"{module}.weight")
    return (spec.component.name if spec is not None else "", module.rpartition(".")[2])


def _medians(subject: Subject, largest: Mapping[str, float]) -> dict[tuple[str, str], float]:
    kinds: dict[tuple[str, str], list[float]] = {}
    for module, value in largest.items():
        kinds.setdefault(_kind_of(subject, module), []).append(value)
    return {kind: statistics.median(values) or math.inf for kind, values in kinds.items()}


def check_shared(subject: Subject, values: ScaleValues) -> Findings:
    """``scales.shared``: q/k/v, and gate/up, have bit for bit the same tensor scale, for kernels apply one to all."""
    found = Findings("scales.shared", "fused linears share one tensor scale", fix=RECONCILE)
    groups = mismatched = 0
    # The order of the fused parts: the first one's scale is the one that vLLM takes.
    for members in subject.layout.scale_groups.values():
        modules = [spec.module for spec in members if spec.module in values.tensor]
        if len(modules) < 2:
            continue
        groups += 1
        roles = [("tensor_scale", values.tensor)]
        if subject.activations is Activations.FP4:
            roles.append(("input_scale", values.inputs))
        for role, scales in roles:
            present = [module for module in modules if module in scales]
            if len({np.float32(scales[module]).tobytes() for module in present}) > 1:
                mismatched += role == "tensor_scale"
                said = ", ".join(f"{module.rpartition('.')[2]} {scales[module]:.6g}" for module in present)
                found.add(f"{present[0].rpartition('.')[0]}: {role.replace('_', ' ')}s differ: {said}")
    if not groups:
        found.unchecked = "no two FP4 linears are fused by kernels"
    found.passed = f"{groups:,} groups of q/k/v or gate/up agree"
    found.failed = f"{mismatched:,} of {groups:,} groups disagree: engines apply the first one's scale to all"
    return found


def check_inputs(subject: Subject, values: ScaleValues) -> Findings:
    """``scales.inputs``: W4A4 has an input scale for every FP4 linear, experts that were never routed to included."""
    found = Findings("scales.inputs", "W4A4 has every input scale", fix="calibrate and quantize again, or use W4A16")
    if not subject.fp4:
        found.unchecked = "no tensor is FP4"
        return found
    with_scale = [module for module, linear in subject.fp4.items() if linear.input_scale is not None]
    if subject.activations is Activations.WIDE:
        found.passed = "W4A16: none is needed"
        if with_scale:
            found.notes.append(f"{len(with_scale):,} are there, and are not used")
        return found
    for module, linear in subject.fp4.items():
        if linear.input_scale is None:
            found.add(f"{module}: W4A4, but it has no input scale")
    found.passed = f"all {len(with_scale):,} FP4 linears have one"
    found.failed = f"{found.count:,} of {len(subject.fp4):,} FP4 linears have none"
    return found


def _name_of(subject: Subject, module: str, role: str) -> str:
    linear = subject.linears[module]
    entry = {"block_scale": linear.block_scale, "tensor_scale": linear.tensor_scale}.get(role, linear.input_scale)
    return entry.name if entry is not None else module
