"""Decompresses an artifact with the compressed-tensors library and compares the values.

    python check_compressed_tensors.py ARTIFACT EXPECTED.safetensors

ARTIFACT is a checkpoint folder in the compressed-tensors dialect; EXPECTED holds
the value of every quantized linear as BF16 `X.weight`. The comparison is exact. The
library computes `bfloat16(code * (float32(block_scale) / global_scale))`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from tensors import Checkpoint, Usage, compare_weights, run

FORMAT = "nvfp4-pack-quantized"


def nvfp4_scheme(artifact: Checkpoint) -> QuantizationScheme:
    """The one NVFP4 scheme of the artifact, parsed by the library's own strict model."""
    config = artifact.quantization_config()
    method, layout = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors" or layout != FORMAT:
        raise Usage(
            f"{artifact.path}: quant_method {method!r}, format {layout!r};"
            f" this check reads 'compressed-tensors', {FORMAT!r}"
        )
    schemes = list(QuantizationConfig.model_validate(config).config_groups.values())
    if len(schemes) != 1 or not isinstance(schemes[0], QuantizationScheme):
        raise Usage(f"{artifact.path}: {len(schemes)} config_groups; this check reads one")
    return schemes[0]


def check(arguments: list[str]) -> int:
    """Runs the check on `[ARTIFACT, EXPECTED]`; returns the number of failures."""
    if len(arguments) != 2:
        raise Usage("usage: check_compressed_tensors.py ARTIFACT EXPECTED.safetensors")
    artifact, expected = (Checkpoint(Path(argument)) for argument in arguments)
    scheme = nvfp4_scheme(artifact)
    leaves = NVFP4PackedCompressor.compression_param_names(scheme)

    def dequantize(module: str) -> torch.Tensor:
        missing = [leaf for leaf in leaves if f"{module}.{leaf}" not in artifact]
        if missing:
            raise Usage(f"{module}: the artifact lacks {', '.join(missing)}")
        state = {leaf: artifact.load(f"{module}.{leaf}") for leaf in leaves}
        value: torch.Tensor = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        return value

    modules = [name.removesuffix(".weight_packed") for name in artifact.names() if name.endswith(".weight_packed")]
    return compare_weights(artifact, expected, modules, dequantize)


if __name__ == "__main__":
    run(check, sys.argv[1:])
