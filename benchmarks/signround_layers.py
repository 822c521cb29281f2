"""SignRound by the layer and by the linear: what each leaves of the error of rounding to the nearest, on the tiny model.

Three artifacts of the bundled trained model have the same scales (the sweep, weighed with E[x^2]) and differ in which way
values are rounded: to the nearest, learned linear by linear, learned layer by layer. All are calibrated on the bundled
calibration set and judged on the bundled samples of the evaluation, which share none with it.

    python benchmarks/signround_layers.py [--samples N] [--folder DIR]
    python benchmarks/signround_layers.py --shape [--device cuda] [--tokens 30720] [--experts 128] [--folder DIR]

Prints a table: seconds to quantize, relative error of the states behind each decoder layer, and KL from BF16 by modality.
With --shape, a released thinker's layers of random weights (two of them, 3.8 GB) are learned instead, and seconds a layer
and memory are printed; a layer takes 36 bytes a weight, 22 GB with all its experts.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import omnifp4
from omnifp4.quantization.recipe import RECIPES
from omnifp4.receipt.evaluation import EvaluationReceipt
from omnifp4.report.figures import figure
from omnifp4.tiny import write_tiny_omni

LAYERS = 4


def recipe_of(against: str, folder: Path) -> str:
    """The recipe with another loss, as a file."""
    recipe = RECIPES["nvfp4-signround"].model_dump(mode="json")
    recipe |= {"name": f"signround-{against}", "method": {**recipe["method"], "against": against}}
    path = folder / f"{recipe['name']}.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def told(title: str) -> Callable[[int, int, str], None]:
    """Progress on one line of standard error."""
    return lambda done, total, item: print(f"\r{title}: {done / max(total, 1):4.0%} {item[:60]:<60}", end="", file=sys.stderr)  # fmt: skip


def row(name: str, seconds: float, states: EvaluationReceipt, whole: EvaluationReceipt) -> str:
    """A line of Markdown."""
    errors = [figure(layer.relative_error) for layer in states.layers]
    kl = [one.model.kl_mean for one in whole.modalities]
    spans = [f"{figure(one.value)} ({figure(one.low)} … {figure(one.high)})" for one in kl]
    return f"| {' | '.join([name, f'{seconds:.0f}', *errors, *spans])} |"


def learn_at_real_shape(folder: Path, device: str, tokens: int, experts: int, steps: int) -> None:
    """Seconds to learn the rounding of one layer of the released shape, and what that makes of all layers."""
    import torch
    from calibration_capture import WHOLE_LAYERS, prepared

    from omnifp4.calibration.hessians import Limits, visit_prepared
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.formats.nvfp4 import ScaleRule
    from omnifp4.quantization.inputs import VisitedInputs
    from omnifp4.quantization.layer_rounding import fits, round_layer
    from omnifp4.quantization.recipe import find_recipe
    from omnifp4.quantization.rounding import Subject
    from omnifp4.tiny import released_config, write_random_checkpoint

    config: Any = json.loads(json.dumps(released_config("qwen3-omni-30b-a3b")))
    config["thinker_config"]["text_config"]["num_experts"] = experts
    model = folder / f"qwen3-omni-2-layers-{experts}-experts"
    if not model.exists():
        write_random_checkpoint(config, model, layers=2, text_only=True)
    recipe, cuda, taken = find_recipe("nvfp4-signround"), device.startswith("cuda"), list[float]()

    def visitor(name: str, layer: Any) -> None:
        groups = [[Subject(weight, layer.weight(weight).float().cpu().numpy())] for weight in layer.names]
        if not fits(groups, layer.device):
            sys.exit(f"{name}: there is no memory to learn its rounding as a whole; see --experts")
        begin = time.monotonic()
        codes = round_layer(groups, recipe, ScaleRule.SWEEP, VisitedInputs(layer), layer, steps=steps)
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.monotonic() - begin)
        print(f"{name}: {taken[-1]:.1f} s, {len(codes):,} of {len(layer.names):,} weights together")

    ready = prepared(open_checkpoint(model), tokens, device, seed=0)
    limits = Limits(sample_inputs=512, least_tokens=64, most_tokens=262_144, runs=True)
    visit_prepared(ready, visitor, limits, sequential=False, progress=lambda *_: None)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{torch.cuda.get_device_name() if cuda else 'cpu'}, torch {torch.__version__}: {tokens:,} tokens, {steps} steps, "
        f"{experts} experts: {WHOLE_LAYERS * min(taken) / 60:.1f} minutes for {WHOLE_LAYERS} layers, peak {peak / 1e9:.1f} GB"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, help="only so many of each task")
    arguments.add_argument("--folder", type=Path, help="for artifacts; a new temporary one if not given")
    arguments.add_argument("--shape", action="store_true", help="time layers of the released shape instead")
    arguments.add_argument("--device", default="cpu", help="of --shape")
    arguments.add_argument("--tokens", type=int, default=30_720, help="of --shape, in sequences of 512")
    arguments.add_argument("--experts", type=int, default=128, help="of --shape: experts a layer")
    arguments.add_argument("--steps", type=int, default=200, help="of --shape")
    chosen = arguments.parse_args()
    folder: Path = chosen.folder or Path(tempfile.mkdtemp(prefix="omnifp4-signround-"))
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.shape:
        learn_at_real_shape(folder, chosen.device, chosen.tokens, chosen.experts, chosen.steps)
        return
    model = folder / "tiny-omni"
    if not model.exists():
        write_tiny_omni(model)
    ways = {
        "nearest": "nvfp4-importance",
        "by the linear": recipe_of("linear", folder),
        "by the layer": recipe_of("layer", folder),
    }
    lines: list[Any] = []
    for name, recipe in ways.items():
        artifact = folder / name.replace(" ", "-")
        begin = time.monotonic()
        if not artifact.exists():
            omnifp4.quantize(model, artifact, recipe=recipe, data="bundled", progress=told(name))
        seconds = time.monotonic() - begin
        common = {
            "against": model,
            "samples": chosen.samples,
            "floor": False,
            "speech": False,
            "cache": folder / "cache",
        }
        states = omnifp4.evaluate(artifact, layers=LAYERS, progress=told(name), **common)
        whole = omnifp4.evaluate(artifact, progress=told(name), **common)
        if not lines:
            heads = [f"states behind layer {layer.layer}" for layer in states.layers]
            heads += [f"KL, {one.modality}" for one in whole.modalities]
            lines = [f"| rounded | seconds | {' | '.join(heads)} |", f"|---|{'---|' * (len(heads) + 1)}"]
        lines.append(row(name, seconds, states, whole))
    print(f"\n{whole.samples} samples, {whole.dtype}, {whole.device}", *lines, sep="\n")


if __name__ == "__main__":
    main()
