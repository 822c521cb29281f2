"""Reading a quantized checkpoint's own account of itself: what its config claims, and which linears its files hold.

Nothing is judged here: a linear may come out with parts missing, and a claim from a place where no engine looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.branch import find_branches
from omnifp4.checkpoint.dialects import DIALECTS, Activations, CodedLinear, LinearEntries, QuantizationClaim
from omnifp4.checkpoint.dialects import find_coded as find_coded_by_type
from omnifp4.checkpoint.folder import CONFIG_NAME, LEGACY_QUANT_CONFIG_NAME, read_json
from omnifp4.checkpoint.header import TensorEntry

ENGINE_PLACE: Final = f"{CONFIG_NAME}: quantization_config"
"""The one place where every engine looks."""

MAX_CONFIG_DEPTH: Final = 50
"""Objects nested deeper than this are not searched."""


def find_linears(tensors: Mapping[str, TensorEntry]) -> dict[str, LinearEntries]:
    """The NVFP4 linears among a checkpoint's tensors, by module.

    Those of `find_coded` are none of them. A module counts if it has codes: a U8 ``X.weight_packed``, or a U8 ``X.weight``; or scales that say it should.
    """
    found: dict[str, LinearEntries] = {}
    others, branches = find_coded(tensors), find_branches(tensors)
    for dialect in DIALECTS.values():
        for name in tensors:
            if not name.endswith(dialect.packed_suffix):
                continue
            module = name.removesuffix(dialect.packed_suffix)
            packed = tensors[name]
            if module in others:
                continue
            scale = tensors.get(module + dialect.block_scale_suffix)
            if packed.dtype != "U8" and (
                scale is None or (dialect.packed_suffix == ".weight" and scale.dtype == "F32")
            ):
                continue
            found.setdefault(
                module,
                LinearEntries(
                    module,
                    packed,
                    scale,
                    tensors.get(module + dialect.tensor_scale_suffix),
                    tensors.get(module + dialect.input_scale_suffix),
                    dialect.reciprocal,
                    branches.get(module),
                ),
            )
    return found


def find_coded(tensors: Mapping[str, TensorEntry]) -> dict[str, CodedLinear]:
    """The FP8, MXFP4 and INT8 linears among a checkpoint's tensors, by module."""
    marks = tuple(dialect.tensor_scale_suffix for dialect in DIALECTS.values())
    return find_coded_by_type(tensors, marks, tuple(dialect.input_scale_suffix for dialect in DIALECTS.values()))


def find_claims(config: Mapping[str, Any], folder: Path | None) -> list[QuantizationClaim]:
    """Every account of a quantization: the config's top-level one first, then nested ones, then the legacy file."""
    claims = []
    for place, value in _config_objects(config, ""):
        claims.append(parse_claim(value, f"{CONFIG_NAME}: {place}"))
    claims.sort(key=lambda claim: claim.place != ENGINE_PLACE)
    if folder is not None and (folder / LEGACY_QUANT_CONFIG_NAME).is_file():
        legacy = read_json(folder / LEGACY_QUANT_CONFIG_NAME)
        claims.append(parse_claim(legacy if isinstance(legacy, dict) else {}, LEGACY_QUANT_CONFIG_NAME))
    return claims


def _config_objects(config: Mapping[str, Any], path: str, depth: int = 0) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for key, value in config.items():
        if isinstance(value, dict):
            place = f"{path}.{key}" if path else key
            if key in {"quantization_config", "compression_config"}:
                yield place, value
            elif depth < MAX_CONFIG_DEPTH:
                yield from _config_objects(value, place, depth + 1)


def _is_nvfp4(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights")
    return isinstance(weights, dict) and (weights.get("num_bits"), weights.get("group_size")) == (4, 16)


def parse_claim(raw: Mapping[str, Any], place: str) -> QuantizationClaim:
    """Read a ``quantization_config``, or the content of a legacy hf_quant_config.json."""
    inner = raw.get("quantization")
    legacy = inner if isinstance(inner, dict) else None
    method = str(raw.get("quant_method", "modelopt" if legacy is not None else "")).lower()
    algorithm = str((legacy or raw).get("quant_algo", "")).upper()
    groups = raw.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    # Where there are several, what is said of NVFP4 counts.
    group = next((g for g in found if _is_nvfp4(g)), found[0] if found else {})
    stated = group.get("weights")
    weights = stated if isinstance(stated, dict) else {}
    inputs = group.get("input_activations")
    fp4_inputs = bool(inputs) if group else algorithm == "NVFP4"
    if isinstance(inputs, dict) and inputs.get("num_bits", 4) != 4:
        fp4_inputs = False
    if algorithm.startswith("W4A16"):
        fp4_inputs = False
    size = (legacy or raw).get("group_size", weights.get("group_size"))
    ignore = legacy.get("exclude_modules") if legacy is not None else raw.get("ignore")
    return QuantizationClaim(
        dialect=method,
        activations=Activations.FP4 if fp4_inputs else Activations.WIDE,
        group_size=size if isinstance(size, int) else 0,
        ignore=tuple(str(entry) for entry in ignore) if isinstance(ignore, list) else (),
        place=place,
        raw=raw,
    )
