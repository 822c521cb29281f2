"""The whole 35 B checkpoint, end to end: generate, plan, quantize, verify; sizes must equal the plan.

Needs room for the wide checkpoint and the artifact (70.5 + 27.5 GB), on a disk or in a memory file system:

    python benchmarks/full_model.py /dev/shm/omni [--layers N] [--format modelopt]

Times whole processes, and prints one JSON line. Fails if a size differs from the plan by a byte or a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(*arguments: str) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes and stdout of one command line of ours, which must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} exited with {process.returncode}:\n{printed[-3000:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--format", default="modelopt")
    arguments = parser.parse_args()
    source, out = arguments.folder / "source", arguments.folder / "artifact"
    shutil.rmtree(out, ignore_errors=True)
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d")}

    def step(name: str, *command: str) -> str:
        seconds, peak, printed = run(*command)
        figures[name] = {"seconds": round(seconds, 2), "peak_gb": round(peak / 1e9, 3)}
        print(f"{name:18s} {seconds:8.2f} s   peak {peak / 1e9:.2f} GB", flush=True)
        return printed

    if not source.exists():
        layers = ["--layers", str(arguments.layers)] if arguments.layers else []
        step("generate", "omnifp4.tiny", str(source), "--real", "qwen3-omni-30b-a3b", *layers)
    plan = json.loads(step("plan", "omnifp4", "plan", str(source), "--json", "--format", arguments.format))
    quantize = ["omnifp4", "quantize", str(source), str(out), "--json", "--format", arguments.format, "--no-check"]
    receipt = json.loads(step("quantize", *quantize))
    json.loads(step("verify", "omnifp4", "verify", str(out), "--json"))
    proof = json.loads(step("verify --against", "omnifp4", "verify", str(out), "--against", str(source), "--json"))
    written = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    if written != plan["shards"] or sum(written.values()) != plan["weight_bytes_after"]:
        raise SystemExit(f"written {written} differs from planned {plan['shards']}")
    figures |= {
        "source_bytes": plan["weight_bytes_before"],
        "artifact_bytes": plan["weight_bytes_after"],
        "gpu_bytes": plan["gpu_bytes"],
        "tensors": plan["tensors"],
        "parameters": plan["parameters"],
        "fp4_share": plan["fp4_share"],
        "relative_squared_error": receipt["relative_squared_error"],
        "verdict": proof["verdict"],
        "checks": {check["name"]: check["verdict"] for check in proof["checks"]},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
