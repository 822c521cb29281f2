"""ModelOpt's own AWQ, lite and full, beside ours, on the same linears and inputs.

    python check_awq_modelopt.py FOLDER

FOLDER is from export_awq.py. ModelOpt's NVFP4 kernel wants a CUDA GPU, so its search runs here with the arithmetic of its
NVFP4QTensor, through a quantizer backend of its own registry. Linears that read one input are one linear, so that they get one
set of factors, as ours do. Weights alone are rounded.
"""

from __future__ import annotations

import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from awq_judge import GROUPS, Exported, compare
from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from tensors import Usage, run

BLOCK = 16
BACKEND = "nvfp4-on-the-cpu"
WEIGHTS = {"num_bits": (2, 1), "block_sizes": {-1: BLOCK, "type": "dynamic", "scale_bits": (4, 3)}, "backend": BACKEND}
"""As in ModelOpt's own NVFP4 configs, but for the backend."""


def nvfp4(weight: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """What the dynamic NVFP4 quantizer makes of a weight ``[out, in]``; its clip search shrinks `quantizer.amax`."""
    amax = weight.abs().max() if quantizer.amax is None else quantizer.amax
    blocks, whole = NVFP4QTensor.get_weights_scaling_factor(weight, BLOCK, amax.float() / (6 * 448))
    scale = (blocks.float() * whole).repeat_interleave(BLOCK, dim=1)
    values: torch.Tensor = NVFP4QTensor.get_e2m1_values("cpu")[NVFP4QTensor._cast_fp4(weight / scale).long()] * scale
    return values


def quantize(weight: torch.Tensor, inputs: torch.Tensor, algorithm: str) -> torch.Tensor:
    """What a linear does to its inputs after one of ModelOpt's algorithms, float32 ``[out, in]``."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    everything = {"quantizer_name": "*", "enable": False}
    weights = {"quantizer_name": "*weight_quantizer", "enable": True, "cfg": WEIGHTS}
    config = {"quant_cfg": [everything, weights], "algorithm": algorithm}
    with redirect_stdout(StringIO()):
        made = mtq.quantize(torch.nn.Sequential(linear), config, lambda model: model(inputs))[0]
    values: torch.Tensor = made.weight_quantizer(made.weight)
    factors = made.input_quantizer.pre_quant_scale
    if algorithm != "max" and factors is None:
        raise RuntimeError(f"ModelOpt's {algorithm} left no factors")
    return values if factors is None else values * factors


def check(arguments: list[str]) -> int:
    """Runs the check on `[FOLDER]`; returns the number of failures."""
    if len(arguments) != 1:
        raise Usage("usage: check_awq_modelopt.py FOLDER")
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore", UserWarning)
    register_quant_backend(BACKEND, nvfp4)
    exported, failures = Exported(Path(arguments[0])), 0
    for layer in exported.layers():
        for group in GROUPS:
            known = exported.weight(layer, group), exported.inputs(layer, group)
            ways = {"plain": "max", "lite": "awq_lite", "full": "awq_full"}
            theirs = {way: quantize(*known, algorithm) for way, algorithm in ways.items()}
            failures += compare(exported, layer, group, "ModelOpt", theirs)
    return failures


if __name__ == "__main__":
    import sys

    run(check, sys.argv[1:])
