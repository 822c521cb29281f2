"""What to say when a load stands still: where it stands, and what is likely to be wrong."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from omnifp4.runtime.progress import Reading

STACK_DEPTH: Final = 12
LOW_MEMORY_BYTES: Final = 2 << 30
REMOTE_FILE_SYSTEMS: Final = ("nfs", "nfs4", "cifs", "smb3", "fuse", "fuse.sshfs", "9p", "lustre", "ceph", "gcsfuse")


def explain_stall(seconds: float, reading: Sequence[tuple[int, Reading]], loader: int, line: str) -> str:
    """A few lines for people.

    Args:
        seconds: how long nothing has moved.
        reading: threads and the tensors that they are reading.
        loader: the thread that runs the load.
        line: progress so far.
    """
    now = time.monotonic()
    lines = [f"\nthe load has stood still for {seconds:.0f} s at: {line.strip()}"]
    for _, item in reading:
        waits = f"for {now - item.since:.0f} s"
        lines.append(f"  reading {item.tensor} ({item.nbytes / 1e6:.1f} MB) of {item.file} {waits}")
    lines += ["  likely causes:", *(f"  - {cause}" for cause in likely_causes(reading))]
    frames = sys._current_frames()
    for thread in dict.fromkeys([loader, *(number for number, _ in reading)]):
        if thread in frames:
            lines.append("  Python stack of the " + ("loading thread:" if thread == loader else "reader:"))
            stack = traceback.format_stack(frames[thread])[-STACK_DEPTH:]
            lines += [f"    {text}" for entry in stack for text in entry.rstrip().splitlines()]
    return "\n".join(lines) + "\n"


def likely_causes(reading: Sequence[tuple[int, Reading]]) -> list[str]:
    """What usually makes a load stand still, judged by what it does now."""
    causes = []
    available = available_bytes()
    if available is not None and available < LOW_MEMORY_BYTES:
        causes.append(
            f"memory is short ({available / 1e9:.1f} GB free): the machine swaps; close programs or load on a GPU"
        )
    if reading:
        for file in dict.fromkeys(item.file for _, item in reading):
            system = file_system(Path(file))
            if system in REMOTE_FILE_SYSTEMS:
                causes.append(
                    f"{file} is on {system}, a network file system that does not answer; copy it to a local disk"
                )
        causes.append("the disk is slow or busy, or the file is still being downloaded; look at its activity")
    else:
        causes.append("no file is being read: the model is being built or copied to the device; the stack below tells")
        causes.append(
            "a dtype other than 'auto' makes every tensor be converted; a device that another program fills makes it wait"
        )
    return causes


def available_bytes() -> int | None:
    """Host memory that programs can still take; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`; empty if unknown."""
    best, found = "", ""
    try:
        target = str(path.resolve())
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, system, *_ = line.split()
            if target.startswith(mount.rstrip("/") + "/") and len(mount) > len(best):
                best, found = mount, system
    except (OSError, ValueError):
        return ""
    return found
