"""This machine: memory, GPUs and what torch sees of them. Works without torch, and without a GPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from omnifp4.receipt.doctor import Accelerator, Machine

TORCH_TIMEOUT_S: Final = 90
SMI_TIMEOUT_S: Final = 20
SMI_QUERY: Final = "name,memory.total,memory.free,compute_cap,driver_version"
MIB: Final = 2**20

TORCH_PROBE: Final = """
import json, sys
import torch
told = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None), "devices": []}
try:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            told["devices"].append([of.name, total, free, f"{of.major}.{of.minor}"])
    elif torch.version.cuda:
        torch.cuda.init()
except Exception as error:
    told["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
sys.stdout.write("\\n" + json.dumps(told))
"""
"""Run in a process of its own: importing torch takes seconds, and a broken driver may abort it."""


def look_at_machine(torch_version: str) -> Machine:
    """Everything about the machine; `torch_version` is the installed one, empty if there is none."""
    seen = _ask_torch() if torch_version and not torch_version.endswith("+cpu") else {}
    accelerators, problem = _gpus_of_torch(seen), str(seen.get("problem") or "")
    from_driver = ask_nvidia_smi()
    if accelerators and from_driver:
        driver = from_driver[0].driver
        accelerators = tuple(gpu.model_copy(update={"driver": driver}) for gpu in accelerators)
    elif from_driver:
        accelerators = from_driver
        if torch_version.endswith("+cpu"):
            problem = "torch is a CPU build, so it cannot use the GPU"
        elif torch_version and not problem:
            problem = "torch sees no GPU although the driver does"
    build = ""
    if torch_version:
        build = "CPU" if torch_version.endswith("+cpu") or (seen and not seen.get("cuda")) else ""
        build = f"CUDA {seen['cuda']}" if seen.get("cuda") else f"ROCm {seen['hip']}" if seen.get("hip") else build
        build = build or "unknown"
    total, free = memory_bytes()
    return Machine(
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=total,
        ram_free_bytes=free,
        torch_build=build,
        torch_problem=problem,
        accelerators=accelerators,
    )


def _ask_torch() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"problem": f"torch did not start: {type(error).__name__}"}
    try:
        told = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        return {"problem": f"torch does not import: {last}"}
    return told if isinstance(told, dict) else {}


def _gpus_of_torch(seen: dict[str, Any]) -> tuple[Accelerator, ...]:
    return tuple(
        Accelerator(name=name, memory_bytes=total, free_bytes=free, compute_capability=capability)
        for name, total, free, capability in seen.get("devices", ())
    )


def ask_nvidia_smi() -> tuple[Accelerator, ...]:
    """The GPUs that the driver knows; none where there is no driver."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return ()
    command = [path, f"--query-gpu={SMI_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_smi(done.stdout) if done.returncode == 0 else ()


def parse_smi(text: str) -> tuple[Accelerator, ...]:
    """Rows of ``name, total MiB, free MiB, compute capability, driver``. Unified memory is told as [N/A]."""
    total_ram, free_ram = memory_bytes()
    found = []
    for line in text.strip().splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5:
            continue
        name, total, free, capability, driver = cells
        found.append(
            Accelerator(
                name=name,
                memory_bytes=int(float(total) * MIB) if _is_number(total) else total_ram,
                free_bytes=int(float(free) * MIB) if _is_number(free) else free_ram,
                compute_capability=capability if _is_number(capability) else "",
                driver=driver,
            )
        )
    return tuple(found)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def memory_bytes() -> tuple[int, int]:
    """RAM in all and RAM that can be had, within the limit of a container."""
    total, free = _meminfo()
    limit, used = _container_limit()
    if limit and limit < total:
        return limit, max(0, min(free, limit - used))
    return total, free


def _meminfo() -> tuple[int, int]:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemTotal"].split()[0]) * 1024, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, 0
    return total, total


def _container_limit() -> tuple[int, int]:
    """Limit and use of the control group; use without the page cache, which gives way."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if not limit.isdigit():
            return 0, 0
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0, 0
    return int(limit), max(0, used - int(stat.get("inactive_file", 0)) - int(stat.get("active_file", 0)))
