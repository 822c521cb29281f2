"""Writes experts, their Hessians and what our GPTQ makes of them, for llm-compressor to judge.

    python export_gptq.py FILE.safetensors

Runs in this project's environment. Columns stand in no order of energy: both libraries take them by falling ``diag(H)`` under
static scales. Each case is a batch of experts ``[experts, out, in]``: inputs that hang together; one expert that has a channel
without any input; and experts that saw fewer tokens than they have inputs, so that the Hessian is singular before it is damped.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnifp4.algorithms.gptq import gptq
from omnifp4.algorithms.grid import decode, max_block_scales, tensor_scales
from omnifp4.formats.nvfp4 import ScaleRule

DAMPING = 0.01
DEAD = 37
"""The channel without input."""
CASES = {
    "dense": (1, 192, 256, 1024),
    "experts": (5, 96, 384, 1024),
    "dead": (3, 96, 256, 1024),
    "few": (4, 96, 384, 96),
}
"""Experts, rows, columns, tokens."""


def make(experts: int, rows: int, columns: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """BF16 weights with heavy tails ``[experts, rows, columns]`` and the inputs of each ``[experts, tokens, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    tails = torch.randn(5, experts, rows, columns, generator=generator).square().mean(dim=0).sqrt()
    weight = 0.02 * torch.randn(experts, rows, columns, generator=generator) / tails
    mix = torch.randn(experts, columns, columns, generator=generator) * torch.arange(1, columns + 1)[:, None] ** -0.5
    gain = torch.exp(0.7 * torch.randn(experts, 1, columns, generator=generator))
    inputs = torch.randn(experts, tokens, columns, generator=generator) @ mix
    inputs = (inputs + 0.5 * torch.randn(experts, tokens, columns, generator=generator)) * gain
    return weight.bfloat16().float(), inputs


def main() -> None:
    tensors: dict[str, Tensor] = {}
    for seed, (name, sizes) in enumerate(CASES.items()):
        weight, inputs = make(*sizes, seed)
        if name == "dead":
            inputs[1, :, DEAD] = 0
        hessian = inputs.mT @ inputs / inputs.shape[1]
        scale = tensor_scales(weight.abs().amax(dim=(1, 2)), ScaleRule.MAX)
        blocks = max_block_scales(weight, scale)
        tensors |= {f"{name}.weight": weight, f"{name}.hessian": hessian, f"{name}.tensor_scale": scale}
        tensors |= {f"{name}.block_scale": blocks}
        tensors[f"{name}.ours"] = decode(gptq(weight, hessian, blocks, scale, damping=DAMPING).rounded)
    save_file({key: value.contiguous() for key, value in tensors.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
