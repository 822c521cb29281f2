"""llm-compressor's own GPTQ beside ours, on the same weights, scales and Hessians, several experts at once.

    python check_gptq_llm_compressor.py FILE.safetensors

FILE is from export_gptq.py. Output errors of each expert must agree within two hundredths, a channel without input counts for
nothing, and no expert may have been rounded to the nearest instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.quantization import ActivationOrdering
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from tensors import Checkpoint, Usage, run

DAMPING = 0.01
TOLERANCE = 0.02
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def quantize(weight: torch.Tensor, hessian: torch.Tensor, blocks: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What its GPTQ makes of ``[experts, out, in]``, columns by falling ``diag(H)``.

    Args:
        weight, hessian: float32; copied, since it works in them.
        blocks: block scales, float32 ``[experts, out, in / 16]``.
        whole: tensor scales by which they are multiplied, float32 ``[experts]``.
    """
    arguments = NVFP4A16["weights"].model_copy(update={"actorder": ActivationOrdering.WEIGHT})
    values, _, nearest = quantize_weight(
        weight.clone(), hessian.clone(), blocks, torch.zeros_like(blocks), 1 / whole, arguments, percdamp=DAMPING
    )
    if bool(nearest.any()):
        raise RuntimeError(f"llm-compressor rounded experts {nearest.nonzero().flatten().tolist()} to the nearest")
    found: torch.Tensor = values
    return found


def output_errors(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``tr(D H D')`` of each expert."""
    return ((difference @ hessian) * difference).sum(dim=(1, 2))


def check(arguments: list[str]) -> int:
    """Runs the check on `[FILE]`; returns the number of failures."""
    if len(arguments) != 1:
        raise Usage("usage: check_gptq_llm_compressor.py FILE.safetensors")
    file, failures = Checkpoint(Path(arguments[0])), 0
    for case in [name.removesuffix(".weight") for name in file.names() if name.endswith(".weight")]:
        weight, hessian, whole, ours = (
            file.load(f"{case}.{part}") for part in ("weight", "hessian", "tensor_scale", "ours")
        )
        blocks = file.load(f"{case}.block_scale").view(torch.float8_e4m3fn).float()
        theirs = quantize(weight, hessian, blocks, whole)
        unit = (blocks * whole[:, None, None]).repeat_interleave(16, dim=-1)
        alive = (hessian.diagonal(dim1=1, dim2=2) > 0)[:, None, :].expand_as(weight)
        codes = [torch.bucketize((values / unit).abs(), LEVELS - 0.1) * values.sign() for values in (ours, theirs)]
        same = float((codes[0] == codes[1])[alive].float().mean())
        errors = [output_errors(values - weight, hessian) for values in (ours, theirs)]
        magnitudes = (weight / unit).abs()
        middles = (LEVELS[1:] + LEVELS[:-1]) / 2
        nearest = LEVELS[torch.bucketize(magnitudes, middles)] * weight.sign() * unit
        gain = errors[1] / output_errors(nearest - weight, hessian)
        ratios = errors[0] / errors[1]
        wrong = int(((ratios - 1).abs() > TOLERANCE).sum())
        print(
            f"{case} gptq: {len(ratios)} experts, output error {float(ratios.min()):.5f} to {float(ratios.max()):.5f} of "
            f"llm-compressor's, which leaves {float(gain.mean()):.3f} of rounding's; {same:.3%} of the codes are the same"
            f"{f', {wrong} TOO FAR' if wrong else ''}"
        )
        failures += wrong
    return failures


if __name__ == "__main__":
    import sys

    run(check, sys.argv[1:])
