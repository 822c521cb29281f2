"""Every tensor that is not FP4 beside its original, bit for bit."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.models.source import Source, SourceTensor
from omnifp4.verification.findings import Findings
from omnifp4.verification.folds import folded_difference
from omnifp4.verification.reading import PANEL_BYTES, Buffers, Meter, batches, in_threads
from omnifp4.verification.subject import Subject
from omnifp4.verification.values import REQUANTIZE, SourceNames


def check_untouched(
    subject: Subject,
    rounded: Collection[str],
    source: Source,
    readers: tuple[CheckpointReader, CheckpointReader],
    threads: int,
    meter: Meter,
) -> Findings:
    """``values.untouched``: what is not FP4 has the type and the bytes of the source; `rounded` are those of a fake-quant checkpoint."""
    found = Findings("values.untouched", "untouched tensors are bit-identical", fix=REQUANTIZE)
    names, tensors = SourceNames(source), subject.checkpoint.tensors
    pairs: list[tuple[TensorEntry, SourceTensor | TensorEntry]] = []
    unmatched = 0
    for name in tensors:
        is_codes = name.endswith(".weight") and name.removesuffix(".weight") in subject.quantized
        if name not in subject.layout.by_name or is_codes or name in rounded:
            continue
        original = names.find(name)
        if original is None:
            unmatched += 1
        else:
            pairs.append((tensors[name], original))
    others = {entry.name: entry for entry in source.buffers} | {
        name: source.checkpoint.tensors[name]
        for name in subject.layout.fused_names
        if name in source.checkpoint.tensors
    }
    pairs += [(tensors[name], entry) for name, entry in others.items() if name in tensors and name not in rounded]
    buffers = Buffers()

    def look(batch: list[tuple[TensorEntry, SourceTensor | TensorEntry]]) -> list[str]:
        problems = []
        for entry, original in batch:
            if problem := _difference(subject, entry, original, readers, buffers):
                problems.append(problem)
            meter.add(2 * entry.nbytes, "untouched tensors")
        return problems

    for problems in in_threads(look, batches(pairs, lambda pair: pair[0].nbytes), threads):
        for problem in problems:
            found.add(problem)
    if not pairs:
        found.unchecked = "no tensor outside the FP4 linears could be joined to the source"
    found.passed = f"{len(pairs):,} tensors, {sum(entry.nbytes for entry, _ in pairs):,} bytes"
    found.failed = f"{found.count:,} of {len(pairs):,} tensors are not as in the source"
    if unmatched:
        found.notes.append(f"{unmatched:,} tensors are not in the source and were not compared")
    return found


def _difference(
    subject: Subject,
    entry: TensorEntry,
    original: SourceTensor | TensorEntry,
    readers: tuple[CheckpointReader, CheckpointReader],
    buffers: Buffers,
) -> str:
    theirs = original if isinstance(original, TensorEntry) else original.entry
    shape = original.shape if isinstance(original, TensorEntry) else original.spec.shape
    if entry.dtype != theirs.dtype:
        return f"{entry.name}: {entry.dtype}, in the source {theirs.dtype}"
    if entry.shape != shape:
        return f"{entry.name}: shape {list(entry.shape)}, in the source {list(shape)}"
    if entry.name in subject.folds:
        bits = original.read(readers[1]) if isinstance(original, SourceTensor) else readers[1].read(original)
        return folded_difference(subject, entry.name, entry.dtype, readers[0].read(entry), bits)
    whole = None
    if isinstance(original, SourceTensor) and original.fused is not None:
        whole = original.read(readers[1]).reshape(-1).view(np.uint8)
    for start in range(0, entry.nbytes, PANEL_BYTES):
        count = min(PANEL_BYTES, entry.nbytes - start)
        mine = buffers.take("mine", count)
        readers[0].read_into(entry, mine, start)
        if whole is None:
            other = buffers.take("other", count)
            readers[1].read_into(theirs, other, start)
        else:
            other = whole[start : start + count]
        if not np.array_equal(mine, other):
            at = start + int(np.argmax(mine != other))
            return f"{entry.name}: differs from the source, first at byte {at:,}"
    return ""
