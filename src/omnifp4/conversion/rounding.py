"""Where no tensor scale of the other dialect gives all products alike: which one changes the fewest weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.conversion.artifact import Artifact
from omnifp4.conversion.inspection import LinearState, read_row_chunks, read_rows
from omnifp4.conversion.scales import TranslatedScale, candidates, decoded_table
from omnifp4.formats.nvfp4 import BLOCK_SIZE, E4M3_MAX_BITS, unpack

Counts = npt.NDArray[np.int64]


def settle_roundings(
    artifact: Artifact,
    reader: CheckpointReader,
    states: Mapping[str, LinearState],
    scales: dict[str, TranslatedScale],
) -> dict[str, int]:
    """For linears whose scale has no perfect translation, take the one that suits the weights that are there.

    Linears of one scale group get one answer.

    Returns:
        How many weights of each linear still change, by one BF16 step; linears where none does are left out.
    """
    groups = [modules for _, modules in artifact.scale_groups()]
    grouped = {module for modules in groups for module in modules}
    groups += [[module] for module in states if module not in grouped]
    differs = {}
    for modules in groups:
        if all(scales[module].same_values for module in modules):
            continue
        pairs = {module: count_pairs(reader, states[module]) for module in modules}
        scale, wrong = best_scale(states[modules[0]], np.sum(list(pairs.values()), axis=0))
        for module in modules:
            scales[module] = scale
            if count := int(pairs[module][wrong].sum()):
                differs[module] = count
    return differs


def count_pairs(reader: CheckpointReader, state: LinearState) -> Counts:
    """How often each pair of block scale and magnitude occurs: int64 ``[126, 7]``, as `scales.decoded_table`."""
    linear = state.linear
    assert linear.block_scale is not None
    counts = np.zeros(256 * 8, dtype=np.int64)
    for begin, packed in read_row_chunks(reader, linear.packed):
        scales = read_rows(reader, linear.block_scale, begin, begin + len(packed)).astype(np.uint16)
        pairs = np.repeat(scales << 3, BLOCK_SIZE, axis=1) | (unpack(packed) & 7)
        counts += np.bincount(pairs.reshape(-1), minlength=counts.size)
    return counts.reshape(256, 8)[1 : E4M3_MAX_BITS + 1, 1:]


def best_scale(state: LinearState, pairs: Counts) -> tuple[TranslatedScale, npt.NDArray[np.bool_]]:
    """The translation that changes the fewest of the given pairs, and the pairs that it changes."""
    assert state.tensor_scale is not None
    reciprocal = state.linear.reciprocal
    wanted = decoded_table(state.tensor_scale, reciprocal=reciprocal)
    found = []
    for distance, candidate in candidates(state.tensor_scale):
        wrong = decoded_table(candidate, reciprocal=not reciprocal) != wanted
        count = int(pairs[wrong].sum())
        found.append((count, TranslatedScale(candidate, False, distance != 0, count == 0), wrong))
    _, scale, wrong = min(found, key=lambda item: item[0])
    return scale, wrong
