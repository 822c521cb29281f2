"""ModelOpt's own max scaling, scale sweep, local Hessian and GPTQ beside ours, on the same weights and Hessians.

    python check_calibrated.py FILE.safetensors

FILE is from export_calibrated.py. Block scales of max scaling and of the sweep must be the same bits; where two scales of the
sweep err alike to the last bits of float32, either may win. Errors under the local Hessian and of GPTQ must agree within two
hundredths. AWQ is compared by check_awq_modelopt.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update
from tensors import Checkpoint, Usage, run

BLOCK = 16
DAMPING = 0.01
TOLERANCE = 0.02
TIE = 1e-4
"""Relative difference of the errors of two scales of which either may win."""


def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values on ModelOpt's own FP4 grid under a scale for each value."""
    codes = NVFP4QTensor._cast_fp4(weight / scale)
    values: torch.Tensor = NVFP4QTensor.get_e2m1_values("cpu")[codes.long()] * scale
    return values


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(D H D')``."""
    return float(((difference @ hessian) * difference).sum())


def sweep(weight: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """The block scales that ModelOpt's 126-step sweep picks, float32 ``[out, in / 16]`` in units of the tensor scale."""
    blocks = weight.reshape(-1, BLOCK)
    amax, whole = blocks.abs().amax(dim=1, keepdim=True), weight.abs().max()
    metric = None
    if hessian is not None:
        count = weight.shape[1] // BLOCK
        own = torch.stack([hessian[b * 16 : b * 16 + 16, b * 16 : b * 16 + 16] for b in range(count)])
        own = own + 0.01 * own.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(BLOCK)

        def metric(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            difference = (x - other).reshape(-1, count, BLOCK)
            loss = torch.einsum("rbi,bij,rbj->rb", difference, own, difference)
            return (loss.reshape(-1, 1) / BLOCK).expand(-1, BLOCK)

    calibrator = NVFP4MSECalibrator(
        amax, whole, axis=0, quant_func=lambda x, largest: rounded(x, largest / 6), error_func=metric
    )
    calibrator.collect(blocks)
    found: torch.Tensor = calibrator.compute_amax() / whole * 448
    return found.reshape(weight.shape[0], -1)


def compare_scales(name: str, ours: torch.Tensor, theirs: torch.Tensor, errors: torch.Tensor) -> int:
    """Counts blocks whose scales differ though their errors do, too. `errors`: ours and theirs of each block."""
    differs = ours != theirs
    worse = differs & ((errors[0] - errors[1]).abs() > TIE * errors[1])
    print(
        f"{name}: {int((~differs).sum())} of {ours.numel()} block scales are the same bits, {int(worse.sum())} are wrong"
    )
    return int(worse.sum())


def block_errors(weight: torch.Tensor, hessian: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """The error of each block under its scale."""
    difference = (rounded(weight, scale.repeat_interleave(BLOCK, dim=1)) - weight).reshape(len(weight), -1, BLOCK)
    if hessian is None:
        return difference.square().sum(dim=-1)
    own = torch.stack([hessian[b * 16 : b * 16 + 16, b * 16 : b * 16 + 16] for b in range(difference.shape[1])])
    own = own + 0.01 * own.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(BLOCK)
    return torch.einsum("rbi,bij,rbj->rb", difference, own, difference)


def check(arguments: list[str]) -> int:
    """Runs the check on `[FILE]`; returns the number of failures."""
    if len(arguments) != 1:
        raise Usage("usage: check_calibrated.py FILE.safetensors")
    file, failures = Checkpoint(Path(arguments[0])), 0
    for key in [name.removesuffix(".weight") for name in file.names() if name.endswith(".weight")]:
        weight, hessian, ours = (file.load(f"{key}.{part}") for part in ("weight", "hessian", "tensor_scale"))
        theirs = NVFP4QTensor.get_weights_scaling_factor_2(weight)
        if abs(float(ours / theirs) - 1) > 2e-7:
            print(f"{key}: tensor scale {float(ours)}, ModelOpt has {float(theirs)}")
            failures += 1
        blocks, _ = NVFP4QTensor.get_weights_scaling_factor(weight, BLOCK, theirs)
        wrong = int((blocks.view(torch.uint8) != file.load(f"{key}.max")).sum())
        print(f"{key} max: {wrong} of {blocks.numel()} block scales differ")
        failures += wrong
        for rule, known in (("sweep", None), ("local_hessian", hessian)):
            mine = file.load(f"{key}.{rule}").view(torch.float8_e4m3fn).float()
            best = sweep(weight, known).to(torch.float8_e4m3fn).float()
            errors = torch.stack([block_errors(weight, known, scale * theirs) for scale in (mine, best)])
            if known is None:
                failures += compare_scales(f"{key} {rule}", mine, best, errors)
                continue
            # Ours tries 19 scales around max scaling, ModelOpt's all 126.
            ours_sum, theirs_sum = (float(part.sum()) for part in errors)
            same = float((mine == best).float().mean())
            print(
                f"{key} {rule}: {same:.2%} of the block scales are the same, error {ours_sum / theirs_sum:.4f} of ModelOpt's"
            )
            failures += abs(ours_sum / theirs_sum - 1) > TOLERANCE
        scale = (blocks.float() * theirs).repeat_interleave(BLOCK, dim=1)
        made = weight.clone()
        inverse = compute_hessian_inverse(hessian, weight, DAMPING)
        gptq_blockwise_update(made, inverse, 128, lambda values, scale=scale: rounded(values.clone(), scale))
        mine_error, their_error = (output_error(v - weight, hessian) for v in (file.load(f"{key}.gptq"), made))
        nearest = output_error(rounded(weight, scale) - weight, hessian)
        print(f"{key} gptq: output error {mine_error / nearest:.4f} of rounding, ModelOpt {their_error / nearest:.4f}")
        failures += abs(mine_error / their_error - 1) > TOLERANCE
    return failures


if __name__ == "__main__":
    import sys

    run(check, sys.argv[1:])
