"""The headers of a checkpoint that is nowhere: what its config says there must be, wide or as `quantize` would write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.folder import SINGLE_SHARD_NAME, Checkpoint
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.errors import OmniFP4Error
from omnifp4.models import layout_for
from omnifp4.models.base import TensorSpec
from omnifp4.tiny import RELEASED_CONFIGS, released_config, tiny_config
from omnifp4.tiny.checkpoint import with_layers

TINY: Final = "tiny"
SYNTHETIC: Final = (TINY, *RELEASED_CONFIGS)
"""Shapes that can be measured without a checkpoint."""


@dataclass(frozen=True)
class Headers:
    """A checkpoint's headers without files.

    Attributes:
        config: the content of config.json.
        wide: what the config says there must be.
        checkpoint: the tensors as they would stand on disk; without files.
    """

    config: Mapping[str, Any]
    wide: tuple[TensorSpec, ...]
    checkpoint: Checkpoint


def shape_config(name: str, layers: int | None) -> dict[str, Any]:
    """The config of a shape, cut to `layers` decoder layers.

    Raises:
        OmniFP4Error: no such shape, or no such number of layers.
    """
    if name not in SYNTHETIC:
        raise OmniFP4Error(f"there is no synthetic shape {name!r}", hint=f"known: {', '.join(SYNTHETIC)}")
    config = tiny_config() if name == TINY else released_config(name)
    return with_layers(config, layers)


def imagine(name: str, config: Mapping[str, Any], *, packed: bool) -> Headers:
    """Headers of the wide checkpoint of a config, or of its artifact by the default recipe."""
    wide = tuple(spec for spec in layout_for(config).tensors if not spec.optional)
    checkpoint = _checkpoint(name, config, ((spec.name, "BF16", spec.shape) for spec in wide))
    if packed:
        from omnifp4.quantization.decisions import CopyUnit, stored_tensors
        from omnifp4.quantization.plan import plan_job

        job = plan_job(checkpoint)
        kept = (entry for unit in job.units if isinstance(unit, CopyUnit) for entry in unit.entries)
        stored = [(entry.name, entry.dtype, entry.shape) for entry in kept]
        for decision in job.quantized:
            stored += [
                (s.name, s.dtype, s.shape) for s in stored_tensors(decision.tensor, decision.scheme, job.output_format)
            ]
        checkpoint = _checkpoint(name, config, stored)
    return Headers(config, wide, checkpoint)


def _checkpoint(
    name: str, config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
) -> Checkpoint:
    entries: dict[str, TensorEntry] = {}
    end = 0
    for tensor, dtype, shape in tensors:
        begin, end = end, end + byte_count(dtype, shape)
        entries[tensor] = TensorEntry(tensor, SINGLE_SHARD_NAME, dtype, shape, begin, end)
    return Checkpoint(name, config, entries, {SINGLE_SHARD_NAME: end})
