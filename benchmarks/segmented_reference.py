"""Measures a run in segments beside plain reading of the same bytes, and its peak memory.

    python -m omnifp4.tiny FOLDER --real qwen3-omni-30b-a3b --layers 4 --text-only
    python benchmarks/segmented_reference.py FOLDER [--device cuda] [--tokens 16] [--rounds 3]

Each round reads the decoder layers' bytes plainly (as many threads and as large pieces as the run uses, into memory
that is used again), then runs a few tokens through the same layers. Before each of the two the files are dropped from the page
cache, as far as the system lets a program do that; ``--warm`` leaves them there. Each measurement is a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the files' pages."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_plainly(folder: Path) -> dict[str, Any]:
    """The decoder layers' tensors, one read each, and nothing done with them."""
    import numpy as np

    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.checkpoint.reader import CheckpointReader
    from omnifp4.segments.loading import MOST_READERS

    checkpoint = open_checkpoint(folder)
    entries = [
        entry for name, entry in checkpoint.tensors.items() if ".layers." in name and name.startswith("thinker.model.")
    ]
    entries.sort(key=lambda entry: (entry.shard, entry.begin))
    threads = min(MOST_READERS, 2 * (os.cpu_count() or 1))
    longest = max(entry.nbytes for entry in entries)
    buffers = [np.zeros(longest, np.uint8) for _ in range(threads)]
    with CheckpointReader(checkpoint) as reader, ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()

        def work(number: int) -> None:
            for entry in entries[number::threads]:
                reader.read_into(entry, buffers[number][: entry.nbytes])

        list(pool.map(work, range(threads)))
        seconds = time.perf_counter() - begin
    return {"bytes": sum(entry.nbytes for entry in entries), "seconds": seconds}


def run_in_segments(folder: Path, device: str, tokens: int) -> dict[str, Any]:
    """A few tokens through every layer."""
    import torch

    from omnifp4.segments import run_segments

    ids = torch.arange(100, 100 + tokens)[None]
    sample = SimpleNamespace(tensors={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, sound_in_video=False)
    begin = time.perf_counter()
    run = run_segments(folder, [sample], device=device, on_logits=lambda *_: None)
    result = {
        "bytes": run.layer_bytes,
        "seconds": run.layer_seconds,
        "waited_seconds": run.waited_seconds,
        "whole_seconds": time.perf_counter() - begin,
        "layers": run.layers,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device.startswith("cuda"):
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def idle_bytes() -> int:
    """Resident memory of the libraries alone."""
    import torch
    import transformers

    import omnifp4.segments.run

    del torch, omnifp4
    transformers.Qwen3OmniMoeForConditionalGeneration  # noqa: B018  # its import is part of what is measured
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--step", choices=("read", "run", "idle"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "read":
        print(json.dumps(read_plainly(options.folder)))
    elif options.step == "run":
        print(json.dumps(run_in_segments(options.folder, options.device, options.tokens)))
    elif options.step == "idle":
        print(json.dumps({"bytes": idle_bytes()}))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Rounds of both, in turn."""

    def step(name: str) -> dict[str, Any]:
        if not options.warm:
            drop_from_cache(options.folder)
        command = [
            sys.executable, __file__, str(options.folder), "--step", name, "--device", options.device,
            "--tokens", str(options.tokens),
        ]  # fmt: skip
        # As the command line sets it.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    idle = step("idle")["bytes"]
    shares = []
    for number in range(options.rounds):
        read, run = step("read"), step("run")
        rates = [one["bytes"] / one["seconds"] / 1e9 for one in (read, run)]
        shares.append(rates[1] / rates[0])
        layer = run["bytes"] / run["layers"]
        print(
            f"round {number}: plain reading {rates[0]:.2f} GB/s, in segments {rates[1]:.2f} GB/s ({shares[-1]:.0%}), waited "
            f"{run['waited_seconds']:.2f} of {run['seconds']:.2f} s; peak memory {run['peak_bytes'] / 1e9:.2f} GB, libraries "
            f"{idle / 1e9:.2f} GB, a layer {layer / 1e9:.2f} GB: {(run['peak_bytes'] - idle) / layer:.2f} layers"
        )
        if "peak_device_bytes" in run:
            print(
                f"  device memory {run['peak_device_bytes'] / 1e9:.2f} GB: {run['peak_device_bytes'] / layer:.2f} layers"
            )
    print(f"median share of the reading speed: {statistics.median(shares):.0%}")


if __name__ == "__main__":
    main()
