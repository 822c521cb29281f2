"""A folder that becomes OUT only when it is complete, and that remembers what is done.

Work happens in ``OUT.partial``. A journal in it has one line for the job and one for every finished unit of work, with
checksums of what the unit wrote. A killed run leaves a journal whose last line may be torn; the next run reads it,
checks the bytes against the checksums, and goes on. At the end ``OUT.partial`` is renamed to ``OUT``, and the journal
goes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from omnifp4.checkpoint.output import TEMPORARY_SUFFIX
from omnifp4.errors import OutputError

JOURNAL_NAME: Final = ".omnifp4-journal"
PARTIAL_SUFFIX: Final = ".partial"


def partial_folder(out: Path) -> Path:
    """Where OUT is being made."""
    return out.with_name(out.name + PARTIAL_SUFFIX)


class Staging:
    """The folder OUT.partial, locked for this process."""

    def __init__(self, out: Path, job: Mapping[str, Any], *, resume: bool) -> None:
        """Start or continue a job.

        Args:
            out: the folder to be made; must not exist.
            job: everything that decides the bytes written; a run continues only its own job.
            resume: continue what an earlier run left, if it left anything.

        Raises:
            OutputError: OUT exists, or is being made by another process, or was begun as another job, or the folder
                cannot be made.
        """
        refuse_existing(out)
        self.out, self.folder = out, partial_folder(out)
        self.finished: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if not resume and _is_there(self.folder):
            if _is_locked(self.folder / JOURNAL_NAME):
                raise _in_use(self.folder)
            raise OutputError(
                f"{self.folder}: left by an unfinished run", hint="add --resume to continue it, or remove the folder"
            )
        try:
            if self.folder.exists() and not (self.folder / JOURNAL_NAME).exists() and any(self.folder.iterdir()):
                # A run makes its journal before anything else.
                raise OutputError(
                    f"{self.folder}: holds files but no journal, so no unfinished run left it",
                    hint="choose another OUT, or move that folder away",
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(self.folder / JOURNAL_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_in_place():
                raise BlockingIOError
            self._read_journal(json.loads(json.dumps(job)))
        except BlockingIOError:
            os.close(self._journal)
            raise _in_use(self.folder) from None
        except BaseException:
            os.close(self._journal)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal >= 0:
            if kind is not None and not self.finished:
                # Nothing is done that another run could go on with.
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._journal)
            self._journal = -1

    def _is_in_place(self) -> bool:
        """Whether the locked file is still the journal: another run may have finished before the lock was ours."""
        try:
            return os.path.samestat(os.fstat(self._journal), (self.folder / JOURNAL_NAME).stat())
        except OSError:
            return False

    def _read_journal(self, job: dict[str, Any]) -> None:
        content = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            os.ftruncate(self._journal, len(content) - len(torn))
        lines = whole.splitlines()
        if not lines:
            self._append({"job": job})
            return
        begun = self._record(lines[0], 1, "job")["job"]
        if not isinstance(begun, dict):
            raise self._damaged(1)
        if begun != job:
            differing = sorted(key for key in job.keys() | begun.keys() if job.get(key) != begun.get(key))
            raise OutputError(
                f"{self.folder}: was begun as another job, with other {', '.join(differing)}",
                hint="repeat the first command with --resume, or remove the folder",
            )
        for number, line in enumerate(lines[1:], 2):
            record = self._record(line, number, "unit")
            if not isinstance(record["unit"], str):
                raise self._damaged(number)
            self.finished[record["unit"]] = record

    def _record(self, line: bytes, number: int, key: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise self._damaged(number) from None
        if not isinstance(record, dict) or key not in record:
            raise self._damaged(number)
        return record

    def _damaged(self, number: int) -> OutputError:
        return OutputError(
            f"{self.folder / JOURNAL_NAME}: line {number} is damaged, so what is done cannot be told",
            hint=f"remove the folder {self.folder} and start again",
        )

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            end = os.fstat(self._journal).st_size
            if (written := os.write(self._journal, line)) == len(line):
                return
            # Another thread's line must not follow a torn one.
            os.ftruncate(self._journal, end)
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({written} of {len(line)} bytes)", self.folder)

    def record(self, unit: str, result: Mapping[str, Any]) -> None:
        """Remember that a unit of work is done; its bytes must be written already. Safe from several threads."""
        record = {"unit": unit, **result}
        self._append(record)
        self.finished[unit] = record

    def forget(self, unit: str) -> None:
        """Take a unit for undone in this run (its bytes turned out damaged)."""
        self.finished.pop(unit, None)

    def commit(self) -> None:
        """Make OUT out of the folder. After this OUT is whole; before it there is no OUT.

        Raises:
            OutputError: OUT came into being meanwhile, or cannot be made; the folder then stays and can be resumed.
        """
        refuse_existing(self.out)
        try:
            for leftover in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink()
            sync_folder(self.folder)
            self.folder.rename(self.out)
            # Only now: without its journal a folder that could not be renamed would be done all over again.
            (self.out / JOURNAL_NAME).unlink()
            sync_folder(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be made of {self.folder}: {error.strerror}") from None


def refuse_existing(out: Path) -> None:
    """Raise OutputError if OUT is there already, even as a dangling link."""
    if _is_there(out):
        raise OutputError(f"{out}: exists already and is never overwritten", hint="choose another OUT or remove it")
    if out.name in {"", ".."}:
        raise OutputError(f"{out}: is no name for a folder", hint="choose another OUT")


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None


def _in_use(folder: Path) -> OutputError:
    return OutputError(f"{folder}: another process is working on it", hint="wait for it, or choose another OUT")


def _is_locked(journal: Path) -> bool:
    """Whether a running process holds the journal."""
    try:
        descriptor = os.open(journal, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(out: Path) -> int:
    """Free bytes on the disk that will hold `out`."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
