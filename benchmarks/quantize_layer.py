"""One real-shape thinker layer from page cache to a written artifact: omnifp4 beside llm-compressor's model_free_ptq.

Whole processes are timed, interpreter start included, one after the other in turn; each run writes a fresh folder and
waits until it is on the disk. "Page cache to file" is the part without the start of the interpreter.
The layer is Qwen3-Omni-30B-A3B's thinker layer (128 experts of width 768, hidden 2048) with heavy-tailed random
weights, 1.25 GB in BF16.

    python benchmarks/quantize_layer.py [--runs 5] [--peer-python PATH] [--folder DIR]

`--peer-python` names the interpreter of an environment with llm-compressor (interop/requirements-compressed-tensors.txt);
without it only omnifp4 is timed. Prints a card and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from omnifp4.tiny import released_config, write_random_checkpoint

PEER_SCRIPT = Path(__file__).with_name("peer_model_free_ptq.py")


def layer_config() -> dict[str, Any]:
    """The thinker's text decoder, one layer deep, as a model of its own with a token table too small to count."""
    text = released_config("qwen3-omni-30b-a3b")["thinker_config"]["text_config"]
    return {
        **text,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "vocab_size": 1024,
        "rope_scaling": None,
        "dtype": "bfloat16",
    }


def timed(command: list[str]) -> tuple[float, int, bytes]:
    """Wall seconds, peak resident bytes and stdout of a process that must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024, printed


def read_whole(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def processor_name() -> str:
    """The processor as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-python")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    home = arguments.folder or Path(tempfile.mkdtemp(prefix="omnifp4-bench-"))
    source = home / "layer"
    if not source.exists():
        write_random_checkpoint(layer_config(), source, seed=0)
    read_whole(source)
    omnifp4 = [sys.executable, "-m", "omnifp4"]
    cases: dict[str, list[str]] = {
        "quantize (sweep)": [*omnifp4, "quantize", str(source), "OUT", "--json", "--no-check"],
        "quantize (sweep) and check": [*omnifp4, "quantize", str(source), "OUT", "--json"],
        "quantize (max)": [*omnifp4, "quantize", str(source), "OUT", "--json", "--no-check", "--rule", "max"],
    }
    if arguments.peer_python:
        cases["model_free_ptq (max)"] = [arguments.peer_python, str(PEER_SCRIPT), str(source), "OUT"]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peak: dict[str, int] = dict.fromkeys(cases, 0)
    for run in range(arguments.runs + 1):
        for name, command in cases.items():
            out = home / "out"
            shutil.rmtree(out, ignore_errors=True)
            taken, memory, printed = timed([str(out) if part == "OUT" else part for part in command])
            if not run:  # the first round warms caches and compiled code
                continue
            seconds[name].append(taken)
            peak[name] = max(peak[name], memory)
            if name == "quantize (sweep)":
                work = f"{name}, page cache to file"
                seconds.setdefault(work, []).append(json.loads(printed)["seconds"])
                peak[work] = peak[name]
    artifact = home / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    timed([*omnifp4, "quantize", str(source), str(artifact), "--no-check"])
    verify = [*omnifp4, "verify", str(artifact), "--against", str(source)]
    name = "verify --against"
    runs = [timed(verify) for _ in range(arguments.runs + 1)][1:]
    seconds[name], peak[name] = [taken for taken, _, _ in runs], max(memory for _, memory, _ in runs)
    machine = {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "numba": metadata.version("numba"),
        "date": time.strftime("%Y-%m-%d"),
    }
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"one thinker layer, {source_bytes / 1e9:.2f} GB BF16, {machine}")
    for name, values in seconds.items():
        line = summary(values)
        print(
            f"  {name:40s} {line['median']:7.2f} s  ({line['min']:.2f} to {line['max']:.2f})  "
            f"{source_bytes / line['median'] / 1e9:5.2f} GB/s  peak {peak[name] / 1e9:.2f} GB"
        )
    if arguments.peer_python:
        ratios = [p / o for p, o in zip(seconds["model_free_ptq (max)"], seconds["quantize (sweep)"], strict=True)]
        print(
            f"  full sweep against model_free_ptq, run by run: {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    print(json.dumps({"machine": machine, "seconds": seconds, "peak_bytes": peak, "source_bytes": source_bytes}))
    if not arguments.folder:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
