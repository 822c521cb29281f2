"""Decompresses an artifact with the compressed-tensors library and compares the values.

    python check_compressed_tensors.py ARTIFACT EXPECTED.safetensors

ARTIFACT is a checkpoint folder in the compressed-tensors dialect; EXPECTED holds
the value of every quantized linear as BF16 `X.weight`. The comparison is exact. Each
linear goes through the compressor of the config group whose targets match its name.
The library computes `bfloat16(code * (float32(block_scale) / global_scale))` in NVFP4.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from tensors import Checkpoint, Usage, compare_weights, run

FORMATS = ("nvfp4-pack-quantized", "mixed-precision")
CODES = (".weight_packed", ".weight")


def read_schemes(artifact: Checkpoint) -> list[QuantizationScheme]:
    """The schemes of the artifact, parsed by the library's own strict model."""
    config = artifact.quantization_config()
    method, layout = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors" or layout not in FORMATS:
        raise Usage(
            f"{artifact.path}: quant_method {method!r}, format {layout!r};"
            f" this check reads 'compressed-tensors', {' and '.join(FORMATS)}"
        )
    schemes = list(QuantizationConfig.model_validate(config).config_groups.values())
    if not all(isinstance(scheme, QuantizationScheme) for scheme in schemes):
        raise Usage(f"{artifact.path}: config_groups that are no schemes")
    return schemes


def scheme_of(module: str, schemes: list[QuantizationScheme]) -> QuantizationScheme:
    """The scheme whose targets match a linear: by its name, or because it is a linear at all."""
    for scheme in schemes:
        if any(match_name(module, target) for target in scheme.targets):
            return scheme
    for scheme in schemes:
        if "Linear" in scheme.targets:
            return scheme
    raise Usage(f"{module}: no config group targets it")


def quantized_modules(artifact: Checkpoint) -> list[str]:
    """Names of linears whose codes are no wide floats."""
    found = []
    for name in artifact.names():
        suffix = next((suffix for suffix in CODES if name.endswith(suffix)), "")
        if suffix and artifact.dtype(name) in ("U8", "I32", "I8", "F8_E4M3"):
            found.append(name.removesuffix(suffix))
    return found


def check(arguments: list[str]) -> int:
    """Runs the check on `[ARTIFACT, EXPECTED]`; returns the number of failures."""
    if len(arguments) != 2:
        raise Usage("usage: check_compressed_tensors.py ARTIFACT EXPECTED.safetensors")
    artifact, expected = (Checkpoint(Path(argument)) for argument in arguments)
    schemes = read_schemes(artifact)

    def dequantize(module: str) -> torch.Tensor:
        scheme = scheme_of(module, schemes)
        compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        leaves = compressor.compression_param_names(scheme)
        missing = [leaf for leaf in leaves if f"{module}.{leaf}" not in artifact]
        if missing:
            raise Usage(f"{module}: the artifact lacks {', '.join(missing)}")
        state = {leaf: artifact.load(f"{module}.{leaf}") for leaf in leaves}
        value: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        # FP8 comes out in the type of its scales, float32.
        return value.to(torch.bfloat16)

    return compare_weights(artifact, expected, quantized_modules(artifact), dequantize)


if __name__ == "__main__":
    run(check, sys.argv[1:])
