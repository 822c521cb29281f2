"""From one dialect to the other, bit-exact in codes and block scales."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from omnifp4.checkpoint.dialects import DIALECTS, Activations, Dialect, StoredTensor
from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.folder import LEGACY_QUANT_CONFIG_NAME, open_checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.output import PlannedOutput, divide_into_shards, plan_shards
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.checkpoint.staging import Staging, refuse_existing
from omnifp4.checkpoint.units import Progress, check_free_space, output_error
from omnifp4.conversion.artifact import Artifact, in_file_order, read_artifact
from omnifp4.conversion.cache_scheme import cache_name, cache_scheme
from omnifp4.conversion.calibrated import refuse_branches
from omnifp4.conversion.inspection import LinearState, inspect_linears
from omnifp4.conversion.packaging import producer, without_claims, write_package
from omnifp4.conversion.rounding import settle_roundings
from omnifp4.conversion.scales import TranslatedScale, translate, translate_input
from omnifp4.conversion.soundness import require_convertible, require_sound
from omnifp4.conversion.writing import ScalarUnit, WorkUnit, Written, copy_units, write_weights
from omnifp4.errors import RecipeError
from omnifp4.receipt.base import package_version, this_environment
from omnifp4.receipt.conversion import ConversionReceipt

SCALARS_A_UNIT: Final = 4096


@dataclass(frozen=True)
class Translation:
    """Everything that decides the bytes of the new artifact.

    Attributes:
        artifact: what is converted.
        target: dialect of the result.
        cache: the ``kv_cache_scheme`` of the new config.
        shards: the tensors of each new shard, in order.
        copies: tensors whose bytes stay, by new name.
        scalars: new tensor scales and input scales, by new name.
        scales: of each linear.
        rounding_differs: see `ConversionReceipt`.
    """

    artifact: Artifact
    target: Dialect
    cache: dict[str, Any] | None
    shards: tuple[tuple[StoredTensor, ...], ...]
    copies: Mapping[str, TensorEntry]
    scalars: Mapping[str, np.float32]
    scales: Mapping[str, TranslatedScale]
    rounding_differs: Mapping[str, int]

    def config(self) -> dict[str, Any]:
        """The new config.json."""
        config = without_claims(self.artifact.checkpoint.config)
        quantization = self.target.quantization_config(
            self.artifact.activations, self.ignore(), producer(), self.artifact.schemes
        )
        if self.cache is not None:
            quantization["kv_cache_scheme"] = self.cache
        return {**config, "quantization_config": quantization}

    def ignore(self) -> list[str]:
        """Entries for every linear that the files hold wide, in the target's words."""
        return self.target.ignore_entries(self.artifact.wide_modules, self.artifact.quantized_modules)

    def units(self) -> list[WorkUnit]:
        """The work, scalars first."""
        names = list(self.scalars)
        steps = range(0, len(names), SCALARS_A_UNIT)
        scalars = [ScalarUnit({name: self.scalars[name] for name in names[s : s + SCALARS_A_UNIT]}) for s in steps]
        return [*scalars, *copy_units(self.copies)]


def convert(
    source: Path,
    out: Path,
    output_format: str,
    *,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int | None = None,
) -> ConversionReceipt:
    """Write an NVFP4 artifact in the other dialect.

    Args:
        source: folder of the artifact.
        out: folder to be made.
        output_format: ``modelopt`` or ``compressed-tensors``. AutoRound's own config over compressed-tensors' tensors
            counts as a third form and can be converted to both.
        resume: go on with what an earlier run of the same conversion left in ``OUT.partial``.
        threads: workers; as many as there are cores if not given.
        progress: told of every finished piece of work.
        max_shard_bytes: divide the tensors anew; if not given, shards hold what they held.

    Returns:
        The receipt, which is also in OUT's omnifp4.json.

    Raises:
        RecipeError: no such format, or it is the artifact's already.
        CheckpointError: the artifact is damaged, or has what the other dialect cannot express.
        OutputError: OUT exists, the disk is too small or fills up, or the leftover is of another job.
    """
    started = time.monotonic()
    if output_format not in DIALECTS:
        raise RecipeError(f"format {output_format!r} is unknown; known are {', '.join(DIALECTS)}")
    refuse_existing(out)
    count = threads or len(os.sched_getaffinity(0))
    checkpoint = open_checkpoint(source)
    refuse_branches(checkpoint)
    artifact = read_artifact(checkpoint)
    with CheckpointReader(artifact.checkpoint) as reader:
        translation = plan_translation(artifact, DIALECTS[output_format], reader, count, max_shard_bytes)
        planned = plan_shards(translation.shards)
        check_free_space(planned, out, source)
        identity = _identity(translation, planned)
        with Staging(out, identity, resume=resume) as staging:
            try:
                written = write_weights(translation.units(), planned, staging, reader, None, count, progress)
                receipt = _receipt(translation, planned, written, time.monotonic() - started)
                updates = {
                    "output_format": output_format,
                    "weight_bytes": planned.weight_bytes,
                    "shards": receipt.shards,
                    "ignore": list(receipt.ignore),
                    "tensors": receipt.tensors,
                }
                note = _note(receipt)
                write_package(source, staging.folder, translation.config(), planned, receipt, updates, note)
                staging.commit()
            except OSError as error:
                raise output_error(error, staging.folder) from error
    return receipt


def plan_translation(
    artifact: Artifact, target: Dialect, reader: CheckpointReader, threads: int, max_shard_bytes: int | None = None
) -> Translation:
    """Decide every tensor of the new artifact. Raises as `convert`."""
    require_convertible(artifact, target)
    states = inspect_linears(artifact, reader, threads)
    require_sound(artifact, states)
    # Linears of one scale group share the stored number, and so its translation.
    scales = {module: _translate_scale(state, target) for module, state in states.items()}
    differs = settle_roundings(artifact, reader, states, scales)
    copies: dict[str, TensorEntry] = {}
    scalars: dict[str, np.float32] = {}
    names = _new_names(artifact, states, scales, target, copies, scalars)
    shards = [[names[entry.name] for entry in entries] for entries in in_file_order(artifact.checkpoint)]
    if max_shard_bytes is not None:
        shards = divide_into_shards(([tensor] for shard in shards for tensor in shard), max_shard_bytes)
    cache = cache_scheme(artifact.claim, target.name)
    return Translation(artifact, target, cache, tuple(map(tuple, shards)), copies, scalars, scales, differs)


def _translate_scale(state: LinearState, target: Dialect) -> TranslatedScale:
    assert state.tensor_scale is not None
    if target.reciprocal == state.linear.reciprocal:
        return TranslatedScale(state.tensor_scale, True, False, True)
    return translate(state.tensor_scale, reciprocal=state.linear.reciprocal)


def _new_names(
    artifact: Artifact,
    states: Mapping[str, LinearState],
    scales: Mapping[str, TranslatedScale],
    target: Dialect,
    copies: dict[str, TensorEntry],
    scalars: dict[str, np.float32],
) -> dict[str, StoredTensor]:
    """What becomes of each tensor, by old name; fills `copies` and `scalars`."""
    names: dict[str, StoredTensor] = {}
    for module, state in states.items():
        linear = state.linear
        stored = target.stored(module, state.shape, Activations.FP4)
        parts = (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale)
        for tensor, entry in zip(stored, parts, strict=True):
            if entry is not None:
                names[entry.name] = tensor
        copies |= {tensor.name: entry for tensor, entry in zip(stored[:2], parts[:2], strict=True) if entry is not None}
        scalars[stored[2].name] = scales[module].value
        if state.input_scale is not None:
            same = target.reciprocal == linear.reciprocal
            scalars[stored[3].name] = state.input_scale if same else translate_input(state.input_scale)
    for module, coded in artifact.coded.items():
        form = target.coded_forms[coded.scheme]
        assert coded.scale is not None
        for tensor, entry in zip(form.stored(module, coded.shape), (coded.codes, coded.scale), strict=False):
            names[entry.name], copies[tensor.name] = tensor, entry
    for name, entry in artifact.checkpoint.tensors.items():
        if name not in names:
            names[name] = _copied(entry, target)
            copies[names[name].name] = entry
    return names


def _copied(entry: TensorEntry, target: Dialect) -> StoredTensor:
    cache = cache_name(entry.name, target.name) if entry.parameters == 1 else None
    if cache is None:
        return StoredTensor(entry.name, entry.dtype, entry.shape)
    return StoredTensor(cache, entry.dtype, (1,) if target.reciprocal else ())


def _identity(translation: Translation, planned: PlannedOutput) -> dict[str, Any]:
    checkpoint = translation.artifact.checkpoint
    return {
        "omnifp4": package_version(),
        "verb": "convert",
        "artifact": headers_sha256(checkpoint),
        "files": file_stamps(checkpoint),
        "format": translation.target.name,
        "shards": {shard.file_name: shard.total_bytes for shard in planned.shards},
    }


def _receipt(translation: Translation, planned: PlannedOutput, written: Written, seconds: float) -> ConversionReceipt:
    artifact, scales = translation.artifact, translation.scales.values()
    checkpoint = artifact.checkpoint
    assert checkpoint.folder is not None
    return ConversionReceipt(
        artifact=checkpoint.folder.absolute().name,
        headers_sha256=headers_sha256(checkpoint),
        model_type=artifact.layout.model_type,
        from_format=artifact.claim.dialect if artifact.claim else artifact.dialect.name,
        to_format=translation.target.name,
        activations=artifact.activations.value,
        fp4_linears=len(artifact.linears),
        exact_tensor_scales=sum(scale.exact for scale in scales),
        nudged_tensor_scales=sum(scale.nudged for scale in scales),
        rounding_differs=dict(translation.rounding_differs),
        ignore=tuple(translation.ignore()),
        notes=tuple(_notes(translation)),
        weight_bytes=planned.weight_bytes,
        shards={shard.file_name: shard.total_bytes for shard in planned.shards},
        tensors=written.checksums,
        resumed_units=written.resumed_units,
        seconds=round(seconds, 3),
        environment=this_environment(),
    )


def _notes(translation: Translation) -> Iterator[str]:
    artifact = translation.artifact
    folder = artifact.checkpoint.folder
    if folder is not None and (folder / LEGACY_QUANT_CONFIG_NAME).is_file():
        yield f"{LEGACY_QUANT_CONFIG_NAME} was left out: config.json says all of it"
    if translation.rounding_differs:
        count, linears = sum(translation.rounding_differs.values()), len(translation.rounding_differs)
        yield f"{count:,} weights of {linears:,} linears decode to the neighbouring BF16 number: no tensor scale avoids it"
    if translation.cache is not None:
        yield "the FP8 key/value cache was carried over, its scales renamed"
    if unknown := artifact.unknown():
        yield f"{len(unknown):,} tensors are in no layout of this model and were copied, as {unknown[0]}"


def _note(receipt: ConversionReceipt) -> str:
    exact = (
        "every decoded weight is the same"
        if not receipt.rounding_differs
        else f"decoded weights are the same but for the last BF16 bit in {len(receipt.rounding_differs)} linears"
    )
    return (
        f"## Converted\n\nThis folder was converted from `{receipt.from_format}` to `{receipt.to_format}` by omnifp4 "
        f"{receipt.environment.omnifp4}: codes and block scales are the same bytes, and {exact}. The record is in "
        "`omnifp4.json`. To check it: `omnifp4 verify .`."
    )
