"""GPTQ's Triton loop against the torch form: on the GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch
from algorithm_data import correlated, heavy_tailed, hessian_of
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        pytest.skip("triton was imported before; run with TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from omnifp4.algorithms.errors import damped, error_of  # noqa: E402
from omnifp4.algorithms.gptq import _columns, gptq  # noqa: E402
from omnifp4.algorithms.gptq_cuda import columns_on_gpu  # noqa: E402
from omnifp4.algorithms.grid import column_scale, decode, round_to_e2m1, tensor_scales  # noqa: E402
from omnifp4.algorithms.scales import choose_block_scales  # noqa: E402
from omnifp4.formats.nvfp4 import ScaleRule  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"


def problem(rows: int, width: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, what their codes are multiplied by, and the inverse Hessians' factors."""
    weight = torch.stack([heavy_tailed(rows, width, seed) for seed in range(experts)])
    scale = tensor_scales(weight.abs().amax((-2, -1)), ScaleRule.SWEEP)
    blocks = choose_block_scales(weight, scale, ScaleRule.SWEEP)
    hessian = torch.stack([damped(hessian_of(correlated(300, width, seed))) for seed in range(experts)]).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    return weight.to(DEVICE), column_scale(blocks, scale).to(DEVICE), factor.to(DEVICE)


@pytest.mark.parametrize(("rows", "width", "experts"), [(37, 80, 2), (1, 16, 1), (8, 128, 1)])
def test_one_block_of_columns_gives_the_same_codes(rows: int, width: int, experts: int) -> None:
    weight, scale, factor = problem(rows, width, experts)
    codes = columns_on_gpu(weight.clone(), scale, factor, 128)
    assert torch.equal(codes, _columns(weight.clone(), scale, factor, 128))


@pytest.mark.parametrize(("width", "columns"), [(400, 128), (48, 1), (112, 48), (80, 20)])
def test_many_blocks_differ_by_ties_of_sums_at_most(width: int, columns: int) -> None:
    weight, scale, factor = problem(33, width, 2)
    codes = columns_on_gpu(weight.clone(), scale, factor, columns)
    assert codes.shape == weight.shape
    differing = (codes != _columns(weight.clone(), scale, factor, columns)).any(dim=-1)
    assert differing.float().mean() < 0.05


def test_ties_and_zeros_of_either_sign() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5])
    values = torch.cat([ties, -ties]).view(1, -1).to(DEVICE)
    codes = columns_on_gpu(values.clone(), torch.ones_like(values), torch.eye(16, device=DEVICE), 16)
    assert torch.equal(codes, round_to_e2m1(values))


def test_experts_do_not_read_each_other() -> None:
    weight, scale, factor = problem(20, 64, 3)
    together = columns_on_gpu(weight.clone(), scale, factor, 32)
    for number in range(3):
        alone = columns_on_gpu(weight[number].clone(), scale[number], factor[number], 32)
        differing = (together[number] != alone).any(dim=-1)
        assert differing.float().mean() < 0.05


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no CUDA GPU")
def test_an_expert_of_the_released_shape_errs_as_little_as_on_the_cpu() -> None:
    weight = heavy_tailed(1536, 2048)
    hessian = hessian_of(correlated(1900, 2048))
    scale = tensor_scales(weight.abs().max(), ScaleRule.SWEEP)
    blocks = choose_block_scales(weight, scale, ScaleRule.SWEEP)
    errors = []
    for device in ("cpu", "cuda"):
        found = gptq(*(part.to(device) for part in (weight, hessian, blocks, scale)))
        assert float(found.damping) == pytest.approx(0.01)
        errors.append(float(error_of(decode(found.rounded).cpu() - weight, hessian)))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
