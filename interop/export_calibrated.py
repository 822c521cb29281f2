"""Writes weights, inputs and what our calibrated algorithms make of them, for ModelOpt to judge.

    python export_calibrated.py FILE.safetensors

Runs in this project's environment. Columns stand in order of falling input energy, so that GPTQ in the order of the columns,
which is ModelOpt's, is GPTQ in the order of falling ``diag(H)``, which is ours.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnifp4.algorithms.errors import diagonal_blocks
from omnifp4.algorithms.gptq import gptq
from omnifp4.algorithms.grid import decode, max_block_scales, tensor_scales
from omnifp4.algorithms.scales import choose_block_scales
from omnifp4.formats.nvfp4 import ScaleRule

DAMPING = 0.01
SHAPES = {"square": (128, 128), "wide": (96, 384)}


def make(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A BF16 weight with heavy tails and the Hessian of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(5, rows, columns, generator=generator).square().mean(dim=0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator) / chi.sqrt()
    mix = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1)[:, None] ** -0.5
    gain = torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs = torch.randn(1024, columns, generator=generator) @ mix
    inputs = (inputs + 0.5 * torch.randn(1024, columns, generator=generator)) * gain
    inputs = inputs[:, inputs.square().sum(dim=0).argsort(descending=True)]
    return weight.bfloat16().float(), inputs.mT @ inputs / 1024


def main() -> None:
    tensors: dict[str, Tensor] = {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        weight, hessian = make(rows, columns, seed)
        scale = tensor_scales(weight.abs().max(), ScaleRule.MAX)
        by_max = max_block_scales(weight, scale)
        blocks = diagonal_blocks(hessian)
        tensors |= {
            f"{name}.weight": weight,
            f"{name}.hessian": hessian,
            f"{name}.tensor_scale": scale,
            f"{name}.max": by_max,
            f"{name}.sweep": choose_block_scales(weight, scale, ScaleRule.SWEEP),
            f"{name}.local_hessian": choose_block_scales(weight, scale, ScaleRule.SWEEP, block_hessian=blocks),
            f"{name}.gptq": decode(gptq(weight, hessian, by_max, scale, damping=DAMPING).rounded),
        }
    save_file({key: value.contiguous() for key, value in tensors.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
