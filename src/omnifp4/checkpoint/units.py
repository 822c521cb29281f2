"""Doing many units of work in a staging folder: by a few threads, resumable, stopping at the first error."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from omnifp4.checkpoint.output import OutputWriter, PlannedOutput
from omnifp4.checkpoint.side_files import side_file_bytes
from omnifp4.checkpoint.staging import Staging, free_bytes, partial_folder
from omnifp4.errors import OutputError

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what was worked on last."""

SMALL_FILES_BYTES: Final = 16 << 20
"""Room kept for receipt, card, config and index."""


class Unit(Protocol):
    """A piece of work that is done and recorded as a whole."""

    @property
    def name(self) -> str:
        """Distinguishes it within its job; what follows the first colon is shown to people."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        ...


AnyUnit = TypeVar("AnyUnit", bound=Unit)


def work_through(
    units: Sequence[AnyUnit],
    staging: Staging,
    run: Callable[[AnyUnit], Mapping[str, Any]],
    threads: int,
    progress: Progress | None,
) -> None:
    """Do every unit that the journal does not have; the first error stops all threads and is raised.

    Args:
        units: with distinct names.
        staging: whose journal has what is done, and gets what `run` returns.
        run: does one unit; ``crc`` of its result holds the CRC-32 of every tensor it wrote.
        threads: number of workers.
        progress: told of every finished unit.
    """
    total = sum(unit.nbytes for unit in units)
    done = sum(unit.nbytes for unit in units if unit.name in staging.finished)
    waiting = iter([unit for unit in units if unit.name not in staging.finished])
    lock, stop, errors = threading.Lock(), threading.Event(), list[BaseException]()

    def loop() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                unit = next(waiting, None)
            if unit is None:
                return
            try:
                staging.record(unit.name, run(unit))
                with lock:
                    done += unit.nbytes
                    if progress:
                        progress(done, total, unit.name.partition(":")[2])
            except BaseException as error:
                errors.append(error)
                stop.set()
                return

    workers = [threading.Thread(target=loop, name=f"unit-{number}", daemon=True) for number in range(threads)]
    for thread in workers:
        thread.start()
    try:
        for thread in workers:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()
        for thread in workers:
            thread.join()
    if errors:
        raise errors[0]


def check_finished(staging: Staging, units: Sequence[Unit], writer: OutputWriter, threads: int) -> int:
    """Compare what an earlier run wrote with its checksums; units that differ are done again. Returns what stays."""

    def intact(unit: Unit) -> bool:
        record = staging.finished[unit.name]
        checksums = record.get("crc")
        return isinstance(checksums, dict) and all(writer.checksum(name) == crc for name, crc in checksums.items())

    known = [unit for unit in units if unit.name in staging.finished]
    with ThreadPoolExecutor(threads) as pool:
        for unit, whole in zip(known, pool.map(intact, known), strict=True):
            if not whole:
                staging.forget(unit.name)
    return len(staging.finished)


def check_free_space(output: PlannedOutput, out: Path, side_folder: Path | None) -> None:
    """Refuse to begin where weights and the side files of `side_folder` cannot fit. Raises OutputError."""
    needed = output.weight_bytes + SMALL_FILES_BYTES + (side_file_bytes(side_folder) if side_folder else 0)
    partial = partial_folder(out)
    written = sum(file.stat().st_blocks * 512 for file in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = free_bytes(out)
    if needed - written > free:
        raise OutputError(
            f"{out}: needs {needed - written:,} bytes and the disk has {free:,} free",
            hint="choose an OUT on another disk, or make room",
        )


def output_error(error: OSError, folder: Path) -> OutputError:
    """The line for a failed write: what the system said, and how to go on."""
    reason = error.strerror or str(error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        reason = "the disk is full"
    return OutputError(
        f"{folder}: {reason}, so the artifact is not finished",
        hint="mend that and run the same command with --resume; nothing done so far is lost",
    )
