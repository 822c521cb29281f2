"""Packed weights take their packed size, and loading takes little more than what stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MEASURE = """
import sys, threading, time
from omnifp4.runtime import install, load
install()
import torch, transformers, json
from omnifp4.formats import fast_cpu

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = 0, False
    def run(self):
        while not self.stop:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

load(sys.argv[2], progress=False)  # everything is imported and warm
before = anonymous()
watch = Peak()
watch.start()
model = load(sys.argv[1], progress=False)
watch.stop = True
held = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
print(json.dumps({"peak": max(watch.peak, anonymous()) - before, "held": held}))
"""


def held_bytes(model: Any) -> int:
    """Bytes of every tensor of a model, each once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-thinker-talker"])
def test_held_bytes_are_the_plans(
    transformers: Any, tiny_omni: Path, artifact: Callable[..., Path], recipe: str
) -> None:
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.quantization.plan import plan_job, plan_receipt
    from omnifp4.runtime import load
    from omnifp4.runtime.packed import NVFP4Linear, PackedExperts

    planned = plan_receipt(plan_job(open_checkpoint(tiny_omni), recipe=recipe)).gpu_bytes
    model = load(artifact(recipe=recipe), progress=False)
    # Gate and up share one tensor scale in memory and have two on disk.
    shared = sum(4 * module.num_experts for module in model.modules() if isinstance(module, PackedExperts))
    assert any(isinstance(module, NVFP4Linear) for module in model.modules())
    persistent = held_bytes(model) - sum(b.numel() * b.element_size() for _, b in model.named_non_persistent_buffers())
    extra = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    computed = sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in model.named_buffers()
        if name in extra and not any(mark in name for mark in ("packed", "block_scale", "tensor_scale"))
    )
    assert persistent - computed == planned - shared


def test_peak_of_loading(transformers: Any, artifact: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint of 0.2 GB in one shard: no copy of the shard, and no second copy of the experts."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    from runtime_artifacts import quantized

    from omnifp4.tiny import write_random_checkpoint
    from small_checkpoints import QWEN3_MOE

    config = QWEN3_MOE | {
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "num_experts": 64,
        "num_hidden_layers": 4,
        "vocab_size": 4096,
        "dtype": "bfloat16",
    }
    wide = write_random_checkpoint(config, tmp_path / "wide", workers=2)
    folder = quantized(wide, tmp_path / "packed", "modelopt", "nvfp4", "max")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(artifact())], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["held"] > 110_000_000
    # The largest tensor is an embedding of 4 MB; threads and the allocator have their own.
    assert measured["peak"] < measured["held"] * 1.05 + 16_000_000, measured
