"""SignRound of weights together: what it promises of the loss, and where it starts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from algorithm_data import correlated, heavy_tailed
from torch import Tensor

from omnifp4.algorithms.grid import decode, encode, max_block_scales, tensor_scales
from omnifp4.algorithms.signround import Rounding, Whole, signround_together
from omnifp4.formats.nvfp4 import ScaleRule

INPUTS = correlated(256, 64)
WEIGHTS = {"first": heavy_tailed(48, 64, 1), "second": heavy_tailed(32, 48, 2)}


def rounding_of(weight: Tensor) -> Rounding:
    scale = tensor_scales(weight.abs().max(), ScaleRule.MAX)
    return Rounding(weight, max_block_scales(weight, scale), scale)


class TwoLayers(Whole):
    """``second relu(first x)``, all samples at every step."""

    def __init__(self, wrong: bool = False) -> None:
        self.weights = dict(WEIGHTS)
        self.wanted = self.outputs(WEIGHTS)
        self.sign = -1.0 if wrong else 1.0

    def outputs(self, weights: Mapping[str, Tensor]) -> Tensor:
        return (INPUTS @ weights["first"].T).relu() @ weights["second"].T

    def put(self, name: str, weight: Tensor) -> None:
        self.weights[name] = weight

    def loss(self) -> float:
        return float((self.outputs(self.weights) - self.wanted).square().sum())

    def gradients(self, step: int) -> Mapping[str, Tensor]:
        leaves = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        loss = (self.outputs(leaves) - self.wanted).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: self.sign * leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def together(whole: TwoLayers, steps: int = 10) -> tuple[float, float]:
    """Loss of the codes that come back, and of rounding to the nearest."""
    pairs = {name: (weight, rounding_of(weight)) for name, weight in WEIGHTS.items()}
    codes, first, best = signround_together(pairs, whole, steps=steps)
    for name, one in codes.items():
        whole.put(name, decode(one))
    assert abs(whole.loss() - best) <= 1e-4 * best
    return best, first


def test_offsets_of_zero_are_rounding_to_the_nearest() -> None:
    for weight in WEIGHTS.values():
        scale = tensor_scales(weight.abs().max(), ScaleRule.MAX)
        blocks = max_block_scales(weight, scale)
        rounding = Rounding(weight, blocks, scale)
        nearest = encode(weight, blocks, scale)
        assert torch.equal(rounding.codes(rounding.up()).codes, nearest.codes)
        assert torch.allclose(weight + rounding.difference(rounding.up()), decode(nearest), rtol=1e-6, atol=1e-9)


def test_weights_learned_together_change_the_whole_less() -> None:
    best, nearest = together(TwoLayers(), steps=30)
    assert best < 0.65 * nearest


def test_it_is_never_worse_than_the_nearest() -> None:
    """Gradients that point the wrong way leave the first look the best."""
    best, nearest = together(TwoLayers(wrong=True))
    assert best == nearest


def test_a_weight_without_gradients_stays_at_the_nearest() -> None:
    class Half(TwoLayers):
        def gradients(self, step: int) -> Mapping[str, Tensor]:
            return {name: value for name, value in super().gradients(step).items() if name == "second"}

    pairs = {name: (weight, rounding_of(weight)) for name, weight in WEIGHTS.items()}
    told: list[int] = []
    codes, _, _ = signround_together(pairs, Half(), steps=20, tell=told.append)
    nearest = {name: rounding_of(weight) for name, weight in WEIGHTS.items()}
    assert torch.equal(codes["first"].codes, nearest["first"].codes(nearest["first"].up()).codes)
    assert not torch.equal(codes["second"].codes, nearest["second"].codes(nearest["second"].up()).codes)
    assert told == list(range(1, 21))
