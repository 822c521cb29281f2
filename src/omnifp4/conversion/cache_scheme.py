"""The FP8 key/value cache: how each dialect announces it and names its scales.

Both store one factor for the keys and one for the values of a layer; engines know both names
(vLLM, `maybe_remap_kv_scale_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from omnifp4.checkpoint.dialects import QuantizationClaim
from omnifp4.errors import CheckpointError

MODELOPT_NAME: Final = re.compile(r"^(?P<attention>.*)\.(?P<which>[kv])_proj\.(?P=which)_scale$")
COMPRESSED_TENSORS_NAME: Final = re.compile(r"^(?P<attention>.*self_attn)\.(?P<which>[kv])_scale$")

FP8_SCHEMES: Final[Mapping[str, Mapping[str, Any]]] = {
    "modelopt": {"dynamic": False, "num_bits": 8, "type": "float"},
    "compressed-tensors": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    },
}


def cache_name(name: str, dialect: str) -> str | None:
    """The name of a cache scale in a dialect; None if `name` is none."""
    found = MODELOPT_NAME.match(name) or COMPRESSED_TENSORS_NAME.match(name)
    if found is None:
        return None
    attention, which = found["attention"], found["which"]
    return f"{attention}.{which}_proj.{which}_scale" if dialect == "modelopt" else f"{attention}.{which}_scale"


def cache_scheme(claim: QuantizationClaim | None, dialect: str) -> dict[str, Any] | None:
    """The ``kv_cache_scheme`` of a dialect that says what a claim says; None where the cache stays wide.

    Raises:
        CheckpointError: the claim says something else than FP8 with one static scale for a layer.
    """
    if claim is None:
        return None
    inner = claim.raw.get("quantization")
    stated = claim.raw.get("kv_cache_scheme")
    algorithm = (inner if isinstance(inner, dict) else claim.raw).get("kv_cache_quant_algo")
    if stated is None and algorithm is None:
        return None
    is_fp8 = algorithm in (None, "FP8")
    if isinstance(stated, dict):
        is_fp8 = is_fp8 and stated.get("num_bits") == 8 and stated.get("type") == "float"
        is_fp8 = is_fp8 and not stated.get("dynamic") and stated.get("strategy") in (None, "tensor")
    elif stated is not None:
        is_fp8 = False
    if not is_fp8:
        raise CheckpointError(
            f"{claim.place}: a key/value cache of {stated if stated is not None else algorithm} cannot be said in the "
            f"{dialect} dialect; only FP8 with one static scale for a layer can",
            hint="remove the cache scheme from the config, or keep the artifact as it is",
        )
    return dict(FP8_SCHEMES[dialect])
