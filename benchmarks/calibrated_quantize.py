"""`omnifp4 quantize --data` at real shape, whole: seconds a layer, peak memory, and what the full model would take.

    python benchmarks/calibrated_quantize.py FOLDER [--recipes nvfp4-gptq …] [--device cuda] [--layers 1 3] [--tokens 30720]
    python benchmarks/calibrated_quantize.py FOLDER --recipes nvfp4-gptq --device cuda --layers 48 --verify

FOLDER gets two checkpoints of random weights of Qwen3-Omni-30B-A3B's thinker as a Qwen3-MoE, cut to a few layers (2.5 GB
for one, 5 GB for three), with the tiny model's tokenizer, and conversations of random words; both stay for the next run. Each recipe
quantizes both: what the larger takes longer is the cost of its further layers, and the rest (reading the set, compiling,
embeddings and head) is paid once. With one number of layers, such as all 48 (61 GB, and 18 GB of output), nothing is
projected; --verify proves the last artifact against its source. --experts cuts the experts of a layer, for a machine where all would take too long.
Every recipe runs in a process of its own, so that its peak memory is its own. Prints a table and JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

WHOLE_LAYERS = 48
WORDS_A_CONVERSATION = 80
FEWEST_EXPERTS = 8
"""That a token chooses, so a layer has at least as many."""
RECIPES = ("nvfp4-importance", "nvfp4-gptq", "nvfp4-awq-lite", "nvfp4-svdquant")


def write_model(folder: Path, layers: int, experts: int) -> Path:
    """The checkpoint of so many layers; made if it is not there."""
    from omnifp4.tiny import released_config, write_random_checkpoint
    from omnifp4.tiny.checkpoint import TINY_FILES, asset_bytes

    model = folder / f"qwen3-moe-{layers}-layers-{experts}-experts"
    if not model.exists():
        thinker = released_config("qwen3-omni-30b-a3b")["thinker_config"]["text_config"]
        config = thinker | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": experts,
            "rope_scaling": None,
        }
        write_random_checkpoint(config, model, layers=layers)
        for name in TINY_FILES:
            (model / name).write_bytes(asset_bytes(name))
    return model


def write_data(folder: Path, tokens: int) -> Path:
    """Conversations of random words, about so many tokens: the cost does not depend on what they say."""
    generator = random.Random(0)
    words = sorted(set((__doc__ or "").split()))
    path, made = folder / f"words-{tokens}.jsonl", []
    for number in range(max(1, tokens // 512)):
        text = " ".join(generator.choices(words, k=WORDS_A_CONVERSATION))
        made.append(json.dumps({"id": f"words-{number}", "messages": text, "answer": "Yes."}))
    path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return path


def quantize(model: Path, data: Path, recipe: str, device: str, out: Path, verify: bool = False) -> dict[str, Any]:
    """One run, with its time and memory."""
    import omnifp4

    for left in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    begin, busy = time.monotonic(), time.process_time()
    receipt = omnifp4.quantize(model, out, recipe=recipe, data=data, device=device)
    seconds, processor = time.monotonic() - begin, time.process_time() - busy
    assert receipt.calibration is not None
    written = sum(receipt.shards.values())
    outputs = {name: found.error / found.data_free for name, found in receipt.calibration.outputs.items()}
    if verify:
        proof = omnifp4.verify(out, against=model)
        print(f"verify --against: {proof.verdict}, {proof.seconds:.1f} s", file=sys.stderr)
    shutil.rmtree(out)
    return {
        "recipe": recipe, "layers": int(model.name.split("-")[2]), "seconds": seconds, "processor_seconds": processor,
        "tokens": receipt.calibration.tokens, "bytes": written, "outputs": outputs,
    }  # fmt: skip


def run_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: quantizes a small model first, which compiles and reads what is read once, then both."""
    import torch

    cuda, runs = arguments.device.startswith("cuda"), []
    recipe = arguments.recipes[0]
    data = write_data(arguments.folder, arguments.tokens)
    models = [write_model(arguments.folder, layers, arguments.experts) for layers in arguments.layers]
    out = arguments.folder / f"out-{recipe}"
    quantize(write_model(arguments.folder, 1, FEWEST_EXPERTS), data, recipe, arguments.device, out)
    for model in models:
        runs.append(quantize(model, data, recipe, arguments.device, out, arguments.verify))
    clocks, whole = ("seconds", "processor_seconds"), {}
    a_layer, once = {}, {}
    if len(runs) > 1:
        few, many = runs
        span = many["layers"] - few["layers"]
        a_layer = {clock: (many[clock] - few[clock]) / span for clock in clocks}
        once = {clock: few[clock] - a_layer[clock] * few["layers"] for clock in clocks}
        whole = {clock: (once[clock] + WHOLE_LAYERS * a_layer[clock]) / 60 for clock in clocks}
    figures = {
        "recipe": recipe, "device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "load_average": os.getloadavg()[0], "processors": os.cpu_count(),
        "experts": arguments.experts, "runs": runs, "a_layer": a_layer, "once": once,
        "whole_minutes": whole,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }  # fmt: skip
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, nargs="+", default=(1, 3), help="one number, or two to project from")
    parser.add_argument("--tokens", type=int, default=30_720)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        run_one(arguments)
        return
    for recipe in arguments.recipes:
        command = [sys.executable, __file__, str(arguments.folder), "--one", "--recipes", recipe]
        command += ["--device", arguments.device, "--layers", *map(str, arguments.layers)]
        command += ["--tokens", str(arguments.tokens), "--experts", str(arguments.experts)]
        command += ["--verify"] if arguments.verify else []
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        figures = json.loads(line)
        runs = figures["runs"]
        print(f"{recipe} on {figures['device']}, {runs[0]['tokens']:,} tokens")
        for run in runs:
            print(f"  {run['layers']} layers: {run['seconds']:.1f} s ({run['processor_seconds']:.1f} s of processors)")
        if len(runs) > 1:
            print(
                f"  a layer {figures['a_layer']['seconds']:.1f} s ({figures['a_layer']['processor_seconds']:.1f} of "
                f"processors), once {figures['once']['seconds']:.1f} s; {WHOLE_LAYERS} layers: "
                f"{figures['whole_minutes']['seconds']:.1f} minutes"
            )
        print(
            f"  peak host {figures['peak_host_bytes'] / 1e9:.1f} GB, device {figures['peak_device_bytes'] / 1e9:.1f} GB"
        )
        print(line, flush=True)


if __name__ == "__main__":
    main()
