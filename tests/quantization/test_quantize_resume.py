"""Killed, interrupted, out of room: OUT is whole or not there, and a second run ends with the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omnifp4
from omnifp4.checkpoint import units
from omnifp4.checkpoint.staging import JOURNAL_NAME
from omnifp4.errors import OutputError
from small_checkpoints import QWEN3_MOE, Tensors, folder_bytes, write_checkpoint

SHARD_BYTES = 20_000
TELLS_TIME = {"omnifp4.json", "README.md"}
"""Files that record time and memory of a run."""

KILLED_AT = """
import errno, os, shutil, signal, sys

source, out, deadly, shard_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
import omnifp4.quantization.run, omnifp4.verification
seen = 0

def die_at(module, name, half=None):
    plain = getattr(module, name)
    def replacement(*arguments, **options):
        global seen
        seen += 1
        if seen == deadly:
            if half:
                half(plain, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)
    setattr(module, name, replacement)

die_at(os, "pwrite", lambda plain, file, data, position: plain(file, bytes(data)[: len(data) // 2], position))
die_at(os, "write", lambda plain, file, data: plain(file, data[: len(data) // 2]))
die_at(os, "fsync")
die_at(os, "replace")
die_at(os, "rename")
die_at(os, "unlink")
die_at(os, "ftruncate")
die_at(shutil, "copyfile", lambda plain, source, target: open(target, "w").write("torn"))
omnifp4.quantize(source, out, resume=True, threads=2, max_shard_bytes=shard_bytes)
sys.stdout.write(f"{seen}")
"""


@pytest.fixture
def source(small_tensors: dict[str, Tensors], tmp_path: Path) -> Path:
    """A small mixture of experts with files beside it."""
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, small_tensors["qwen3_moe"], shards=2)
    (folder / "tokenizer.json").write_text("tokens " * 1000)
    (folder / "README.md").write_text("the source's card")
    return folder


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    quantize(source, tmp_path / "whole")
    return comparable(tmp_path / "whole")


def quantize(source: Path, out: Path, **options: Any) -> Any:
    options = {"threads": 1, "max_shard_bytes": SHARD_BYTES} | options
    return omnifp4.quantize(source, out, **options)


def comparable(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(folder).items() if name not in TELLS_TIME}


def run_killed_at(source: Path, out: Path, event: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_AT, str(source), str(out), str(event), str(SHARD_BYTES)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_killed_at_any_moment_a_resumed_run_ends_with_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    counted = run_killed_at(source, tmp_path / "count", 0)
    assert counted.returncode == 0, counted.stderr
    events = int(counted.stdout)
    assert events > 100
    # Every run gets further than the one before; the last few moments are those of making OUT out of OUT.partial.
    for event in (1, 8, 31, 22):
        done = run_killed_at(source, out, event)
        assert done.returncode == -signal.SIGKILL, done.stderr
        if out.exists():
            break
        assert partial.exists()
    else:
        done = run_killed_at(source, out, 0)
        assert done.returncode == 0, done.stderr
    assert comparable(out).items() - {JOURNAL_NAME: b""}.items() >= whole.items()
    assert not partial.exists()
    assert comparable(tmp_path / "count") == whole


def test_killed_while_out_is_being_made_of_the_partial_folder(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    events = int(run_killed_at(source, tmp_path / "count", 0).stdout)
    for before_the_end in range(9):
        out = tmp_path / f"out{before_the_end}"
        killed = run_killed_at(source, out, events - before_the_end)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if out.exists():
            # Renamed already: it is whole, and only the journal may be left in it.
            assert {name for name in folder_bytes(out) if name not in whole} <= TELLS_TIME | {JOURNAL_NAME}
            with pytest.raises(OutputError, match="exists already"):
                quantize(source, out, resume=True)
        else:
            quantize(source, out, resume=True)
        found = comparable(out)
        found.pop(JOURNAL_NAME, None)
        assert found == whole
        assert omnifp4.verify(out, against=source).verdict == "pass"


def test_a_resumed_run_does_only_what_is_missing(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped_at = interrupt(source, tmp_path / "out", 20)
    told: list[int] = []
    receipt = quantize(source, tmp_path / "out", resume=True, progress=lambda done, total, item: told.append(done))
    assert receipt.resumed_units == 20
    assert told[0] > stopped_at
    assert comparable(tmp_path / "out") == whole


def interrupt(source: Path, out: Path, after: int) -> int:
    """Run until so many units are done; returns the bytes done."""
    done_bytes = 0

    def stop(done: int, total: int, item: str) -> None:
        nonlocal after, done_bytes
        after, done_bytes = after - 1, done
        if after == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, progress=stop)
    assert not out.exists()
    return done_bytes


def test_a_flipped_byte_is_found_and_its_unit_done_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 20)
    shard = tmp_path / "out.partial" / "model-00001-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x10
    shard.write_bytes(data)
    receipt = quantize(source, tmp_path / "out", resume=True)
    assert receipt.resumed_units == 19
    assert comparable(tmp_path / "out") == whole


def test_a_missing_or_cut_shard_is_done_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 20)
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], 1000)
    receipt = quantize(source, tmp_path / "out", resume=True)
    assert receipt.resumed_units < 15
    assert comparable(tmp_path / "out") == whole


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_journal_is_read_up_to_the_tear(source: Path, whole: dict[str, bytes], tmp_path: Path, cut: int) -> None:
    interrupt(source, tmp_path / "out", 10)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    os.truncate(journal, journal.stat().st_size - cut)
    assert quantize(source, tmp_path / "out", resume=True).resumed_units == 9
    assert comparable(tmp_path / "out") == whole


def test_what_an_unfinished_run_left_is_not_taken_unasked(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 5)
    before = folder_bytes(tmp_path / "out.partial")
    with pytest.raises(OutputError, match=r"out\.partial: left by an unfinished run \(add --resume"):
        quantize(source, tmp_path / "out")
    assert folder_bytes(tmp_path / "out.partial") == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"recipe": "nvfp4-mlp"}, "recipe"),
        ({"rule": "max"}, "rule"),
        ({"format": "compressed-tensors"}, "format"),
        ({"components": ["thinker.head=nvfp4"]}, "components"),
        ({"max_shard_bytes": 10**9}, "shards"),
    ],
)
def test_another_job_s_work_is_not_taken_over(source: Path, tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    interrupt(source, tmp_path / "out", 5)
    before = folder_bytes(tmp_path / "out.partial")
    with pytest.raises(OutputError, match=rf"begun as another job, with other .*{told}"):
        quantize(source, tmp_path / "out", resume=True, **changed)
    assert folder_bytes(tmp_path / "out.partial") == before


def test_a_source_that_changed_meanwhile_is_another_job(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 5)
    shard = source / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OutputError, match="with other files"):
        quantize(source, tmp_path / "out", resume=True)


def test_a_folder_that_another_process_works_on_is_left_to_it(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 5)
    with (tmp_path / "out.partial" / JOURNAL_NAME).open() as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(OutputError, match="another process is working on it"):
                quantize(source, tmp_path / "out", resume=resume)
    quantize(source, tmp_path / "out", resume=True)


def make_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def make_empty_folder(out: Path) -> None:
    out.mkdir()


def make_file(out: Path) -> None:
    out.write_text("mine")


def make_dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("make", [make_folder, make_empty_folder, make_file, make_dangling_link])
def test_an_existing_out_is_never_touched(
    source: Path, tmp_path: Path, make: Callable[[Path], None], resume: bool
) -> None:
    out = tmp_path / "out"
    make(out)
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="exists already and is never overwritten"):
        quantize(source, out, resume=resume)
    assert folder_bytes(tmp_path) == before
    assert os.path.lexists(out)


@pytest.mark.parametrize("place", ["source", "source/out", "source/deep/er/out", "source/../source/out", "link/out"])
def test_out_inside_the_source_is_refused(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to("source")
    before = folder_bytes(source)
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"lies inside the source|exists already"):
            quantize(source, tmp_path / place, resume=resume)
    assert folder_bytes(source) == before


@pytest.mark.parametrize("link", [False, True])
def test_a_source_in_the_place_of_the_partial_folder_is_not_written_over(
    source: Path, tmp_path: Path, link: bool
) -> None:
    partial = tmp_path / "model.partial"
    if link:
        partial.symlink_to(source)
    else:
        shutil.copytree(source, partial)
    before = folder_bytes(partial)
    with pytest.raises(OutputError, match=r"where the source is|lies inside the source"):
        quantize(partial, tmp_path / "model", resume=True)
    assert folder_bytes(partial) == before


def test_a_folder_that_only_has_the_name_of_a_partial_one_is_not_taken_over(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("somebody's own")
    before = folder_bytes(partial)
    with pytest.raises(OutputError, match="holds files but no journal"):
        quantize(source, tmp_path / "out", resume=True)
    assert folder_bytes(partial) == before


def test_too_little_disk_is_said_before_anything_is_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = omnifp4.plan(source, max_shard_bytes=SHARD_BYTES).weight_bytes_after
    monkeypatch.setattr(units, "free_bytes", lambda out: needed)
    with pytest.raises(OutputError, match=rf"out: needs [\d,]+ bytes and the disk has {needed:,} free"):
        quantize(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


class FullDisk:
    """`os.pwrite` on a disk with room for so many more bytes; the write that meets the end stops short first."""

    def __init__(self, room: int, code: int = errno.ENOSPC) -> None:
        self.room, self.code, self.plain = room, code, os.pwrite

    def __call__(self, file: int, data: Any, position: int) -> int:
        if self.room <= 0:
            raise OSError(self.code, os.strerror(self.code))
        count = self.plain(file, bytes(data)[: self.room], position)
        self.room -= count
        return count


@pytest.mark.parametrize(("room", "code"), [(10, errno.ENOSPC), (40_000, errno.ENOSPC), (60_000, errno.EDQUOT)])
def test_a_disk_that_fills_up_ends_in_a_resumable_state(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, code: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", FullDisk(room, code))
        with pytest.raises(OutputError, match=r"out\.partial: the disk is full.*--resume"):
            quantize(source, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", resume=True)
    assert comparable(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["fsync", "replace", "rename"])
def test_a_failing_disk_at_the_end_ends_in_a_resumable_state(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, broken)
        with pytest.raises(OutputError, match="Input/output error"):
            quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert quantize(source, tmp_path / "out", resume=True).resumed_units == 27
    assert comparable(tmp_path / "out") == whole


def test_an_error_of_the_listener_stops_the_run(source: Path, tmp_path: Path) -> None:
    def listener(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(OutputError, match="Broken pipe"):
        quantize(source, tmp_path / "out", progress=listener)
    assert not (tmp_path / "out").exists()


def test_progress_ends_at_the_whole(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    quantize(source, tmp_path / "out", threads=2, progress=lambda *update: told.append(update))
    totals = {total for _, total, _ in told}
    assert len(totals) == 1
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][0] == totals.pop()
    assert any("experts.3" in item for _, _, item in told)


def test_names_that_no_disk_can_hold_are_refused(source: Path, tmp_path: Path) -> None:
    for name in ("x" * 300, "y" * 250):  # The second is short enough, but not with `.partial`.
        with pytest.raises(OutputError, match="File name too long"):
            quantize(source, tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        quantize(source, tmp_path / "file" / "out")
