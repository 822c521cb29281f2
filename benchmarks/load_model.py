"""Loading an NVFP4 artifact from page cache: seconds, rate, memory by part, beside reading the files alone.

    python benchmarks/load_model.py ARTIFACT [--device cuda] [--no-speech] [--runs 3]

Prints one line a run and one JSON line. The files are read once before, so that all runs find them in the page cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import omnifp4

CHUNK_BYTES = 1 << 24


def read_all(folder: Path) -> tuple[int, float]:
    """Bytes and seconds of reading every shard once, one thread, into one buffer."""
    started, total = time.perf_counter(), 0
    buffer = bytearray(CHUNK_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total, time.perf_counter() - started


def held_bytes(module: Any) -> int:
    """Bytes of the parameters and buffers of a module, shared ones once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()]}
    return sum(tensors.values())


def thinker_text_bytes(model: Any) -> int | None:
    """Bytes of the text decoder of an omni model, its head and embeddings included; None for another model."""
    thinker = getattr(model, "thinker", None)
    if thinker is None:
        return None
    return sum(held_bytes(part) for part in (thinker.lm_head, getattr(thinker.model, "language_model", thinker.model)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-speech", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    import torch

    # Imported before the clock starts: that takes seconds, once a process, and has no bytes in it.
    import_module("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    read_all(arguments.artifact)
    file_bytes, read_seconds = min((read_all(arguments.artifact) for _ in range(arguments.runs)), key=lambda r: r[1])
    cuda = arguments.device.startswith("cuda")
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "file_bytes": file_bytes,
        "read_once_seconds": read_seconds,
        "load_seconds": [],
    }
    for _ in range(arguments.runs):
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model = omnifp4.load(
            arguments.artifact, device=arguments.device, speech=not arguments.no_speech, progress=False
        )
        if cuda:
            torch.cuda.synchronize()
            figures["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - started
        figures["load_seconds"].append(round(seconds, 3))
        figures["held_bytes"] = held_bytes(model)
        figures["thinker_text_bytes"] = thinker_text_bytes(model)
        print(
            f"{seconds:.2f} s, {figures['held_bytes'] / 1e9:.2f} GB, {figures['held_bytes'] / seconds / 1e9:.2f} GB/s"
        )
        del model
    print(f"reading {file_bytes / 1e9:.2f} GB once: {read_seconds:.2f} s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
