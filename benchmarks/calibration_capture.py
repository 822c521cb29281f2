"""Calibration at real shape: seconds a layer and peak memory, for few and for many tokens, projected to the whole model.

    python benchmarks/calibration_capture.py FOLDER [--device cuda] [--tokens 2048 8192] [--layers 2] [--hessians | --gradients]

FOLDER gets random weights of Qwen3-Omni-30B-A3B's thinker, cut to a few layers (3.8 GB for two), and is kept for the
next run. Two numbers of tokens give the fixed cost of a layer (reading, all-expert statistics, writing) and the cost of
a token. On a CPU that others use too, ``idle_seconds`` tell what the processors worked, divided by the threads: what the
same threads would need if they had the machine for themselves and never waited. With --hessians, the full Hessian of every linear and expert is made and factored too, as GPTQ would;
with --gradients, squared gradients of answers of 32 tokens are collected beside the statistics (the head, run once, then
counts as layers).
Prints a card and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the cores from those that read ahead.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from omnifp4.calibration.capture import CaptureSettings, capture
from omnifp4.calibration.encoding import CalibrationSequence, sequences_digest
from omnifp4.calibration.failures import Failures
from omnifp4.calibration.hessians import LayerInputs, Limits, visit_prepared
from omnifp4.calibration.preparation import DTYPES, Preparation
from omnifp4.checkpoint.folder import Checkpoint, open_checkpoint
from omnifp4.evaluation.data import Sample
from omnifp4.models import layout_for
from omnifp4.tiny import released_config, write_random_checkpoint

WHOLE_LAYERS = 48
SEQUENCE_TOKENS = 512
ANSWER_TOKENS = 32
"""Whose gradients are taken."""
PROJECTED_TOKENS = (30_000, 262_144)
DAMPING = 0.01


def prepared(checkpoint: Checkpoint, tokens: int, device: str, seed: int) -> Preparation:
    """Random token ids in place of conversations: the cost does not depend on what they say."""
    generator = torch.Generator().manual_seed(seed)
    linears = {
        spec.name: spec
        for spec in layout_for(checkpoint.config).tensors
        if spec.is_linear and spec.name in checkpoint.tensors
    }
    sequences = []
    for number in range(tokens // SEQUENCE_TOKENS):
        ids = torch.randint(0, 150_000, (1, SEQUENCE_TOKENS), generator=generator)
        sample = Sample(f"random {number}", "", "text", (), None)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sequences.append(
            CalibrationSequence(
                sample, tensors, False, SEQUENCE_TOKENS - ANSWER_TOKENS, {"text": SEQUENCE_TOKENS}, f"{seed}-{number}"
            )
        )
    return Preparation(
        checkpoint, linears, "random", tuple(sequences), sequences_digest(sequences), Failures(len(sequences), 0.0), {},
        torch.device(device), DTYPES["bfloat16"],
    )  # fmt: skip


def factor(_: str, inputs: LayerInputs) -> None:
    """The Hessian of every weight, damped and factored."""
    for name in inputs.names:
        if inputs.source(name) == "none" or name.endswith((".up_proj.weight", ".k_proj.weight", ".v_proj.weight")):
            continue
        hessian = inputs.hessian(name)
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny)
        torch.linalg.cholesky_ex(hessian)


def seconds_of(checkpoint: Checkpoint, tokens: int, arguments: Any) -> dict[str, float]:
    """One run: wall and processor seconds."""
    ready = prepared(checkpoint, tokens, arguments.device, seed=tokens)
    out = arguments.folder / f"statistics-{tokens}.safetensors"
    out.unlink(missing_ok=True)
    began, used = time.perf_counter(), time.process_time()
    if arguments.hessians:
        limits = Limits(sample_inputs=512, least_tokens=64, most_tokens=262_144)
        visit_prepared(ready, factor, limits, sequential=False, progress=lambda *_: None)
        size = 0
    else:
        capture(ready, out, CaptureSettings(speech=False, gradients=arguments.gradients), lambda *_: None)
        size = out.stat().st_size
        out.unlink()
    if ready.device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "tokens": tokens, "seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used,
        "file_bytes": size,
    }  # fmt: skip


def best(checkpoint: Checkpoint, tokens: int, arguments: Any) -> dict[str, float]:
    """The fastest of some runs: other work on the machine only ever adds."""
    runs = [seconds_of(checkpoint, tokens, arguments) for _ in range(arguments.repeats)]
    fastest = dict(min(runs, key=lambda run: run["seconds"]))
    fastest["processor_seconds"] = min(run["processor_seconds"] for run in runs)
    fastest["idle_seconds"] = fastest["processor_seconds"] / torch.get_num_threads()
    return fastest


def cost(few: dict[str, float], many: dict[str, float], clock: str, layers: int) -> tuple[float, float]:
    """Fixed seconds of a layer, and seconds of a token in it."""
    a_token = (many[clock] - few[clock]) / (many["tokens"] - few["tokens"]) / layers
    return few[clock] / layers - a_token * few["tokens"], a_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs=2, default=(2048, 8192))
    parser.add_argument("--repeats", type=int, default=2)
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--hessians", action="store_true")
    work.add_argument("--gradients", action="store_true")
    arguments = parser.parse_args()
    model = arguments.folder / f"qwen3-omni-{arguments.layers}-layers"
    if not model.exists():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(released_config("qwen3-omni-30b-a3b"), model, layers=arguments.layers, text_only=True)
    checkpoint = open_checkpoint(model)
    seconds_of(checkpoint, SEQUENCE_TOKENS, arguments)  # imports, page cache, the device's first kernels
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    runs = [best(checkpoint, tokens, arguments) for tokens in arguments.tokens]
    cuda = arguments.device.startswith("cuda")
    clocks = ["seconds"] if cuda else ["seconds", "idle_seconds"]
    costs = {clock: cost(runs[0], runs[1], clock, arguments.layers) for clock in clocks}
    figures: dict[str, Any] = {
        "work": "full Hessians, factored" if arguments.hessians
        else "statistics and gradients" if arguments.gradients
        else "statistics",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processors": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "layers": arguments.layers, "runs": runs,
        "cost_a_layer": {clock: {"fixed_seconds": one[0], "seconds_a_token": one[1]} for clock, one in costs.items()},
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "projected_minutes": {
            clock: {str(tokens): WHOLE_LAYERS * (one[0] + one[1] * tokens) / 60 for tokens in PROJECTED_TOKENS}
            for clock, one in costs.items()
        },
    }  # fmt: skip
    print(f"{figures['work']} on {figures['device']}, {figures['threads']} threads, load {figures['load_average']:.1f}")
    for run in runs:
        print(
            f"  {run['tokens']:,} tokens, {arguments.layers} layers: {run['seconds']:.1f} s, {run['idle_seconds']:.1f} s idle"
        )
    for clock, (fixed, a_token) in costs.items():
        print(f"  {clock}: a layer {fixed:.2f} s + {1e6 * a_token:.0f} us a token")
        for tokens in PROJECTED_TOKENS:
            minutes = figures["projected_minutes"][clock][str(tokens)]
            print(f"    {WHOLE_LAYERS} layers, {tokens:,} tokens: {minutes:.0f} minutes")
    print(
        f"  peak memory: host {figures['peak_host_bytes'] / 1e9:.1f} GB, device {figures['peak_device_bytes'] / 1e9:.1f} GB"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
