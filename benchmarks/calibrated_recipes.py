"""Output error of every calibrated recipe against the data-free sweep, and how long a full-size thinker would take.

    python benchmarks/calibrated_recipes.py                       layers of released shapes, made-up weights and inputs
    python benchmarks/calibrated_recipes.py --device cuda         the same on a GPU
    python benchmarks/calibrated_recipes.py --model M --data SET  a whole checkpoint, through quantize

Made-up weights are Student t with five degrees of freedom, columns of unlike size; made-up inputs have a spectrum that
falls as 1/k, some channels eight times as large, and as many tokens as an expert sees of a real set. The error is
``tr(D H D')`` over that of the sweep: on the inputs that were used, and on others of the same kind.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omnifp4.algorithms.awq import Reader, column_sizes, search_smoothing
from omnifp4.algorithms.errors import diagonal_blocks, error_of, scaled_blocks
from omnifp4.algorithms.gptq import gptq
from omnifp4.algorithms.grid import Codes, decode, encode, tensor_scales
from omnifp4.algorithms.scales import choose_block_scales, choose_clipped_scales
from omnifp4.algorithms.signround import signround
from omnifp4.algorithms.svdquant import svdquant
from omnifp4.formats.nvfp4 import ScaleRule

SWEEP = ScaleRule.SWEEP
DAMPING = 0.03

SHAPES = {
    "expert gate+up": (1536, 2048, 128 * 48),
    "expert down": (2048, 768, 128 * 48),
    "attention q+k+v": (5120, 2048, 48),
    "attention o": (2048, 4096, 48),
}
"""Rows, columns, and how many of them the thinker of Qwen3-Omni-30B-A3B has."""

RECIPES = (
    "nvfp4",
    "nvfp4-importance",
    "nvfp4-local-hessian",
    "nvfp4-gptq",
    "nvfp4-awq-lite",
    "nvfp4-awq-full",
    "nvfp4-svdquant",
    "nvfp4-signround",
)


@dataclass(frozen=True)
class Layer:
    """A weight ``[out, in]``, Hessians of the inputs that are used and of others, and ``E|x|``."""

    weight: Tensor
    hessian: Tensor
    unseen: Tensor
    abs_mean: Tensor


def make_layer(rows: int, columns: int, tokens: int, seed: int, device: str) -> Layer:
    """A layer as the module's text says."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(5, rows, columns, generator=generator).square().mean(dim=0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator) / chi.sqrt()
    weight *= torch.exp(0.3 * torch.randn(columns, generator=generator))
    mix = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1)[:, None] ** -0.5
    gain = torch.exp(0.5 * torch.randn(columns, generator=generator))
    gain[torch.randperm(columns, generator=generator)[: columns // 100]] *= 8
    inputs = torch.randn(2 * tokens, columns, generator=generator) @ mix
    inputs = ((inputs + torch.randn(2 * tokens, columns, generator=generator)) * gain).to(device)
    seen, unseen = inputs[:tokens], inputs[tokens:]
    hessian, other = (part.mT @ part / tokens for part in (seen, unseen))
    return Layer(weight.to(device), hessian, other, seen.abs().mean(dim=0))


def methods(layer: Layer, steps: int) -> dict[str, Callable[[], Tensor]]:
    """What each recipe makes of the weight, decoded."""
    weight, hessian = layer.weight, layer.hessian
    scale = tensor_scales(weight.abs().max(), SWEEP)
    blocks, importance = diagonal_blocks(hessian), hessian.diagonal()

    def by_importance(value: Tensor, own: Tensor = scale) -> Codes:
        return encode(value, choose_block_scales(value, own, SWEEP, importance=importance), own)

    def local() -> Tensor:
        return decode(encode(weight, choose_block_scales(weight, scale, SWEEP, block_hessian=blocks), scale))

    def awq(full: bool) -> Tensor:
        def rounding(value: Tensor, factors: Tensor, _: Tensor) -> Tensor:
            own = tensor_scales(value.abs().max(), SWEEP)
            chosen = choose_block_scales(value, own, SWEEP, importance=importance / factors**2)
            return decode(encode(value, chosen, own))

        factors = search_smoothing([Reader(weight, hessian)], layer.abs_mean, column_sizes(weight), rounding).factors
        if not full:
            return rounding(weight * factors, factors, hessian) / factors
        own = tensor_scales((weight * factors).abs().max(), SWEEP)
        clipped = choose_clipped_scales(weight * factors, own, scaled_blocks(blocks, factors), SWEEP)
        return decode(encode(weight * factors, clipped, own)) / factors

    def split() -> Tensor:
        found = svdquant(weight, hessian, by_importance)
        return decode(found.rounded) + found.branch.product()

    chosen = by_importance(weight).block_scale
    return {
        "nvfp4": lambda: decode(encode(weight, choose_block_scales(weight, scale, SWEEP), scale)),
        "nvfp4-importance": lambda: decode(by_importance(weight)),
        "nvfp4-local-hessian": local,
        "nvfp4-gptq": lambda: decode(gptq(weight, hessian, chosen, scale, damping=DAMPING).rounded),
        "nvfp4-awq-lite": lambda: awq(False),
        "nvfp4-awq-full": lambda: awq(True),
        "nvfp4-svdquant": split,
        "nvfp4-signround": lambda: decode(signround(weight, hessian, chosen, scale, steps=steps)),
    }


def measure_layers(arguments: argparse.Namespace) -> None:
    """Every method on every shape: errors over those of the sweep, seconds, and the projection."""
    hours: dict[str, float] = dict.fromkeys(RECIPES, 0.0)
    for number, (shape, (rows, columns, count)) in enumerate(SHAPES.items()):
        layer = make_layer(rows, columns, arguments.tokens, number, arguments.device)
        base = (0.0, 0.0)
        for name, make in methods(layer, arguments.steps).items():
            if arguments.only and name not in (*arguments.only, "nvfp4"):
                continue
            if arguments.device != "cpu":
                make()  # kernels are compiled and libraries set up on their first use
            _wait(arguments.device)
            begin, busy = time.perf_counter(), time.process_time()
            values = make()
            _wait(arguments.device)
            # On the CPU what counts is the time that this process had, spread over two cores: others may run beside it.
            on_cpu = arguments.device == "cpu"
            seconds = (time.process_time() - busy) / 2 if on_cpu else time.perf_counter() - begin
            errors = [float(error_of(values - layer.weight, h)) for h in (layer.hessian, layer.unseen)]
            if name == "nvfp4":
                base = (errors[0], errors[1])
            hours[name] += seconds * count / 3600
            relative = float((values - layer.weight).square().sum() / layer.weight.square().sum())
            row = {"shape": shape, "recipe": name, "seen": round(errors[0] / base[0], 3)}
            row |= {"unseen": round(errors[1] / base[1], 3), "weight_error": round(relative, 5)}
            print(json.dumps(row | {"seconds": round(seconds, 3)}), flush=True)
    for name, value in hours.items():
        if value:
            print(json.dumps({"recipe": name, "projected_hours_of_arithmetic": round(value, 2)}))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_model(arguments: argparse.Namespace) -> None:
    """Every recipe through `quantize` on one checkpoint: the receipt's errors by component."""
    import omnifp4

    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only or RECIPES[1:]:
            receipt = omnifp4.quantize(
                arguments.model, Path(folder) / name, recipe=name, data=arguments.data, device=arguments.device
            )
            assert receipt.calibration is not None
            for component, found in receipt.calibration.outputs.items():
                row = {"recipe": name, "component": component, "seen": round(found.error / found.data_free, 3)}
                row |= {"output_error": round(found.error, 6), "weight_error": round(receipt.relative_squared_error, 6)}
                print(json.dumps(row | {"seconds": receipt.seconds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="that a linear sees")
    parser.add_argument("--steps", type=int, default=200, help="of SignRound")
    parser.add_argument("--only", nargs="*", default=[], help="these recipes")
    parser.add_argument("--model", help="a wide checkpoint")
    parser.add_argument("--data", default="bundled")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.model:
        measure_model(arguments)
    else:
        measure_layers(arguments)


if __name__ == "__main__":
    main()
