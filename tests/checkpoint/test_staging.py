"""The folder that becomes OUT: killed at any moment, resumed, locked, refused, and never half a result."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import staging_job
from staging_job import JOB, UNITS

from omnifp4.checkpoint.staging import JOURNAL_NAME, Staging, free_bytes, partial_folder, refuse_existing
from omnifp4.errors import OutputError


def worker(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("staging_job.py")), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def finish(process: subprocess.Popen[str]) -> tuple[int, int]:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done, redone = map(int, output.split()[-2:])
    return done, redone


def begun(out: Path, units: int = 3) -> Path:
    """A folder that an unfinished run left."""
    with Staging(out, JOB, resume=False) as staging:
        for number in range(units):
            staging.record(f"unit.{number}", {"crc": number})
    return partial_folder(out) / JOURNAL_NAME


def refusal(out: Path, job: dict[str, Any] | None = None, *, resume: bool = True) -> str:
    with pytest.raises(OutputError) as caught:
        Staging(out, job or JOB, resume=resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    finish(worker(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    assert set(expected) == {"index.json", *(f"model-0000{n}-of-00005.safetensors" for n in range(1, 6))}
    chance = random.Random(5)
    kept = left = 0
    for number in range(5):
        out = tmp_path / f"killed-{number}"
        process = worker(out)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if out.exists():
            assert contents(out).items() >= expected.items()
            continue
        assert partial_folder(out).is_dir()
        done, redone = finish(worker(out))
        assert done + redone == UNITS
        kept, left = kept + done, left + redone
        assert contents(out) == expected
        assert not partial_folder(out).exists()
    assert kept
    assert left


def test_every_prefix_of_a_journal_can_be_resumed(tmp_path: Path) -> None:
    """A torn last line, wherever it is torn, costs that line alone."""
    journal = begun(tmp_path / "out")
    whole = journal.read_bytes()
    for end in range(len(whole) + 1):
        journal.write_bytes(whole[:end])
        with Staging(tmp_path / "out", JOB, resume=True) as staging:
            assert len(staging.finished) == max(0, whole[:end].count(b"\n") - 1)
            staging.record("next", {})
        with Staging(tmp_path / "out", JOB, resume=True) as staging:
            assert "next" in staging.finished


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize(
    "damage", [b"{", b"", b"[]", b"\xff\xff", b"\0\0\0", b'{"unit": 1}', b'{"job": 1}', b"[" * 5000]
)
def test_a_journal_damaged_in_the_middle_is_told(tmp_path: Path, line: int, damage: bytes) -> None:
    journal = begun(tmp_path / "out")
    lines = journal.read_bytes().splitlines()
    lines[line] = damage
    journal.write_bytes(b"\n".join(lines) + b"\n")
    message = refusal(tmp_path / "out")
    assert f"{journal}: line {line + 1} is damaged" in message
    assert f"remove the folder {journal.parent} and start again" in message


def test_another_job_is_refused_naming_what_differs(tmp_path: Path) -> None:
    journal = begun(tmp_path / "out")
    before = journal.read_bytes()
    message = refusal(tmp_path / "out", {"source": "abc", "recipe": "nvfp4-mlp", "rule": "max"})
    assert "was begun as another job, with other recipe, rule, shards" in message
    assert journal.read_bytes() == before


def test_a_left_folder_is_refused_without_resume(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    assert "left by an unfinished run (add --resume" in refusal(tmp_path / "out", resume=False)


def test_resuming_nothing_starts_anew(tmp_path: Path) -> None:
    with Staging(tmp_path / "deep" / "out", JOB, resume=True) as staging:
        assert not staging.finished
        assert staging.folder.is_dir()


@pytest.mark.parametrize("resume", [False, True])
def test_another_process_at_work_is_told(tmp_path: Path, resume: bool) -> None:
    code = (
        "import sys; from pathlib import Path; from omnifp4.checkpoint.staging import Staging\n"
        f"staging = Staging(Path({str(tmp_path / 'out')!r}), {JOB!r}, resume=False); print('begun', flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    message = refusal(tmp_path / "out", resume=resume)
    assert "another process is working on it" in message
    assert "remove" not in message
    process.communicate("\n", timeout=60)
    with Staging(tmp_path / "out", JOB, resume=True):
        pass


def test_a_lock_on_a_journal_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run finishes between our opening of the journal and our lock on it."""
    from omnifp4.checkpoint import staging as module

    begun(tmp_path / "out")
    flock = module.fcntl.flock

    def finish_meanwhile(file: int, how: int) -> None:
        partial_folder(tmp_path / "out").rename(tmp_path / "out")
        flock(file, how)

    monkeypatch.setattr(module.fcntl, "flock", finish_meanwhile)
    assert "another process" in refusal(tmp_path / "out")


def test_out_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        assert "exists already and is never overwritten" in refusal(tmp_path / name)
        assert not partial_folder(tmp_path / name).exists()


@pytest.mark.parametrize("out", [".", "/", "..", "", "nowhere/.."])
def test_names_that_are_no_folder_to_make(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(Path(out))


def test_names_that_are_too_long(tmp_path: Path) -> None:
    for length in (250, 300):
        assert "File name too long" in refusal(tmp_path / ("x" * length))
    (tmp_path / "file").touch()
    assert "cannot be made" in refusal(tmp_path / "file" / "out")


def test_commit_refuses_what_came_meanwhile_and_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, JOB, resume=False) as staging:
        staging.record("unit", {"crc": 1})
        out.mkdir()
        (out / "precious").touch()
        with pytest.raises(OutputError, match="exists already"):
            staging.commit()
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    out.rmdir()
    with Staging(out, JOB, resume=True) as staging:
        assert staging.finished["unit"]["crc"] == 1
        (staging.folder / "weights").touch()
        (staging.folder / ".config.json.tmp").touch()
        staging.commit()
    assert [path.name for path in out.iterdir()] == ["weights"]
    assert not partial_folder(out).exists()


def test_a_rename_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with Staging(out, JOB, resume=False) as staging:
        staging.record("unit", {})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(30, os.strerror(30))))
            with pytest.raises(OutputError, match=r"cannot be made of .*: Read-only file system"):
                staging.commit()
    with Staging(out, JOB, resume=True) as staging:
        assert "unit" in staging.finished


def test_a_run_that_fails_before_anything_is_done_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), Staging(out, JOB, resume=False) as staging:
        (staging.folder / "laid-out").touch()
        raise RuntimeError
    assert not partial_folder(out).exists()
    with pytest.raises(RuntimeError), Staging(out, JOB, resume=False) as staging:
        staging.record("unit", {})
        raise RuntimeError
    with pytest.raises(RuntimeError), Staging(out, JOB, resume=True) as staging:
        raise RuntimeError
    with Staging(out, JOB, resume=True) as staging:
        assert "unit" in staging.finished


@pytest.mark.parametrize("room", range(0, 48, 6))
def test_a_disk_that_fills_up_leaves_what_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(staging_job, "PAUSE_S", 0)
    staging_job.run(tmp_path / "whole")
    pwrite, writes = os.pwrite, [0]

    def fill_up(file: int, data: bytes, position: int) -> int:
        writes[0] += 1
        if writes[0] > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, position)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill_up)
        if room < UNITS + 5:
            with pytest.raises(OSError, match="No space left"):
                staging_job.run(out)
            assert not out.exists()
    there, done = staging_job.run(out)
    assert (there, done) == (max(0, room - 5), UNITS - max(0, room - 5))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_leaves_a_journal_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was written half is taken back, so that another thread's line does not follow it."""
    out = tmp_path / "out"
    write = os.write
    with Staging(out, JOB, resume=False) as staging:
        staging.record("first", {})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write(file, data[:5]))
            with pytest.raises(OSError, match="No space left"):
                staging.record("second", {})
        assert "second" not in staging.finished
        staging.record("third", {})
    with Staging(out, JOB, resume=True) as staging:
        assert set(staging.finished) == {"first", "third"}
        staging.forget("first")
        assert set(staging.finished) == {"third"}


def test_the_journal_is_lines_of_json(tmp_path: Path) -> None:
    lines = begun(tmp_path / "out").read_text().splitlines()
    assert json.loads(lines[0]) == {"job": JOB}
    assert [json.loads(line)["unit"] for line in lines[1:]] == ["unit.0", "unit.1", "unit.2"]


def test_free_bytes_and_refuse_existing(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
    refuse_existing(tmp_path / "not" / "yet")
