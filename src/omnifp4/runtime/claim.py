"""Which ``quantization_config`` announces NVFP4 weights that run here, and its life as a Transformers object."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Final

from transformers.utils.quantization_config import QuantizationConfigMixin

from omnifp4.checkpoint.artifact import ENGINE_PLACE, parse_claim
from omnifp4.checkpoint.branch import BRANCH_ALGORITHM
from omnifp4.checkpoint.dialects import QuantizationClaim
from omnifp4.errors import CheckpointError
from omnifp4.runtime.options import current_options

MODELOPT: Final = "modelopt"
COMPRESSED_TENSORS: Final = "compressed-tensors"
AUTO_ROUND: Final = "auto-round"

PACKED_FORMAT: Final = "nvfp4-pack-quantized"
MODELOPT_ALGORITHMS: Final = ("NVFP4", "W4A16_NVFP4", BRANCH_ALGORITHM, "MIXED_PRECISION")

CODED_GROUPS: Final = (
    ("mxfp4-pack-quantized", 4, "float", 32),
    ("float-quantized", 8, "float", None),
    ("naive-quantized", 8, "float", None),
    ("pack-quantized", 8, "int", None),
    ("naive-quantized", 8, "int", None),
    ("int-quantized", 8, "int", None),
)
"""Format, bits, type and group size of the groups beside NVFP4 that run here.

A config of 8-bit groups alone is one that Transformers runs itself, with 8-bit inputs where it says so: it is taken only
by `omnifp4.load`.
"""


class NVFP4CheckpointConfig(QuantizationConfigMixin):
    """A checkpoint's own ``quantization_config``, kept as it stands so that it is saved as it stands."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = copy.deepcopy(dict(raw))
        # A plain string: Transformers' enumeration has no ModelOpt.
        self.quant_method: Any = str(raw["quant_method"])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See `QuantizationConfigMixin.from_dict`."""
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def claim(self) -> QuantizationClaim:
        """What the config says, read."""
        return parse_claim(self.raw, ENGINE_PLACE)

    def to_dict(self) -> dict[str, Any]:
        """The config as it was read."""
        return copy.deepcopy(self.raw)

    def to_diff_dict(self) -> dict[str, Any]:
        """The config as it was read."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The config as it was read, as JSON."""
        return json.dumps(self.raw, indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def announces_nvfp4(raw: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one that omnifp4 runs rather than Transformers' own quantizer."""
    method = raw.get("quant_method")
    if method == MODELOPT:
        return True
    if method == COMPRESSED_TENSORS:
        return _is_packed_nvfp4(raw)
    if method == AUTO_ROUND:
        return raw.get("data_type") == "nv_fp" and str(raw.get("packing_format", "")).endswith(":llm_compressor")
    return False


def check_algorithm(raw: Mapping[str, Any]) -> None:
    """Refuse ModelOpt algorithms that do not run here.

    Raises:
        CheckpointError: with what the config asks for.
    """
    if raw.get("quant_method") == MODELOPT and raw.get("quant_algo") not in MODELOPT_ALGORITHMS:
        raise CheckpointError(
            f"{ENGINE_PLACE}: quant_algo {raw.get('quant_algo')!r} cannot be run here; it must be one of "
            f"{', '.join(MODELOPT_ALGORITHMS)}"
        )


def _is_packed_nvfp4(raw: Mapping[str, Any]) -> bool:
    groups = raw.get("config_groups")
    # Rotations would have to be applied to the inputs as well.
    if not isinstance(groups, Mapping) or not groups or raw.get("transform_config"):
        return False
    found = list(groups.values())
    if not all(isinstance(group, Mapping) and _is_packed_group(group, raw.get("format")) for group in found):
        return False
    return any(group["weights"]["num_bits"] == 4 for group in found) or current_options().checkpoint is not None


def _is_packed_group(group: Mapping[str, Any], top_format: object) -> bool:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        return False
    numbers = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"))
    form = group.get("format") or top_format
    if form == PACKED_FORMAT:
        return numbers == (4, "float", 16)
    is_even = weights.get("symmetric") is not False and weights.get("strategy") in ("channel", "tensor", "group")
    return is_even and (form, *numbers) in CODED_GROUPS


def rounds_inputs(raw: Mapping[str, Any]) -> bool:
    """Whether a config says that layers get 8-bit inputs, which stay wide here."""
    groups = raw.get("config_groups")
    found = [group.get("input_activations") for group in groups.values()] if isinstance(groups, Mapping) else []
    if any(isinstance(inputs, Mapping) and inputs.get("num_bits") == 8 for inputs in found):
        return True
    layers = raw.get("quantized_layers")
    algorithms = [raw.get("quant_algo")]
    if isinstance(layers, Mapping):
        algorithms += [info.get("quant_algo") for info in layers.values() if isinstance(info, Mapping)]
    return any(str(algorithm).upper().startswith("FP8") for algorithm in algorithms)
