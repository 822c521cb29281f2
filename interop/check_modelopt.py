"""Dequantizes an artifact with ModelOpt's own tensor classes and compares the values.

    python check_modelopt.py ARTIFACT EXPECTED.safetensors

ARTIFACT is a checkpoint folder in the ModelOpt dialect; EXPECTED holds the value of
every quantized linear as BF16 `X.weight`. The comparison is exact. ModelOpt computes
`bfloat16(code * (float32(block_scale) * weight_scale_2))` in NVFP4. In mixed precision each
linear is what `quantized_layers` says of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor
from tensors import Checkpoint, Usage, compare_weights, run

BLOCK_SIZE = 16
MXFP4_BLOCK_SIZE = 32


def dequantize(artifact: Checkpoint, module: str) -> torch.Tensor:
    """The BF16 value of one linear, shape [out, in], computed by ModelOpt.

    Raises:
        Usage: a scale is missing.
    """
    scales = [f"{module}.weight_scale", f"{module}.weight_scale_2"]
    missing = [name for name in scales if name not in artifact]
    if missing:
        raise Usage(f"{module}: the artifact lacks {', '.join(missing)}")
    codes = artifact.load(f"{module}.weight")
    shape = torch.Size([*codes.shape[:-1], codes.shape[-1] * 2])
    block_scale, tensor_scale = (artifact.load(name) for name in scales)
    value: torch.Tensor = NVFP4QTensor(shape, torch.bfloat16, codes).dequantize(
        dtype=torch.bfloat16,
        scale=block_scale,
        double_scale=tensor_scale,
        block_sizes={-1: BLOCK_SIZE},
    )
    return value


def dequantize_other(artifact: Checkpoint, module: str, algorithm: str) -> torch.Tensor:
    """The BF16 value of one FP8 or MXFP4 linear, shape [out, in], computed by ModelOpt.

    Raises:
        Usage: another algorithm.
    """
    codes, scale = artifact.load(f"{module}.weight"), artifact.load(f"{module}.weight_scale")
    value: torch.Tensor
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        value = FP8QTensor(codes.shape, torch.bfloat16, codes).dequantize(dtype=torch.bfloat16, scale=scale[:, None])
    elif algorithm == "MXFP4":
        shape = torch.Size([*codes.shape[:-1], codes.shape[-1] * 2])
        value = MXFP4QTensor(shape, torch.bfloat16, codes).dequantize(
            dtype=torch.bfloat16, scale=scale, block_sizes={-1: MXFP4_BLOCK_SIZE}
        )
    else:
        raise Usage(f"{module}: quant_algo {algorithm!r}; this check reads FP8_PER_CHANNEL_PER_TOKEN and MXFP4")
    return value


def check(arguments: list[str]) -> int:
    """Runs the check on `[ARTIFACT, EXPECTED]`; returns the number of failures."""
    if len(arguments) != 2:
        raise Usage("usage: check_modelopt.py ARTIFACT EXPECTED.safetensors")
    artifact, expected = (Checkpoint(Path(argument)) for argument in arguments)
    config = artifact.quantization_config()
    method, algorithm = config.get("quant_method"), str(config.get("quant_algo"))
    if method != "modelopt" or algorithm not in ("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"):
        raise Usage(
            f"{artifact.path}: quant_method {method!r}, quant_algo {algorithm!r};"
            " this check reads 'modelopt' with NVFP4, W4A16_NVFP4 or MIXED_PRECISION"
        )
    modules = [
        name.removesuffix(".weight")
        for name in artifact.names()
        if name.endswith(".weight") and artifact.dtype(name) in ("U8", "F8_E4M3")
    ]
    layers = config.get("quantized_layers", {})

    def value(module: str) -> torch.Tensor:
        said = str(layers[module]["quant_algo"]) if layers else algorithm
        if said in ("NVFP4", "W4A16_NVFP4"):
            return dequantize(artifact, module)
        return dequantize_other(artifact, module, said)

    return compare_weights(artifact, expected, modules, value)


if __name__ == "__main__":
    run(check, sys.argv[1:])
