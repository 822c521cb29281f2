"""Hidden states in files: a disk that is full is told in one line, before anything is written to the mapping."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from omnifp4.errors import OutputError  # noqa: E402
from omnifp4.segments import states  # noqa: E402


def kept(work: Path) -> Any:
    return states.States([3, 5], 1024, torch.float32, limit_bytes=0, work=work, key="a run")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on a disk")
def test_the_room_is_there_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a mapped file with holes on a full disk ends a process by SIGBUS, without a word."""
    assert kept(tmp_path / "work").nbytes == 8 * 1024 * 4
    for name in ("states-0.bin", "states-1.bin"):
        assert (tmp_path / "work" / name).stat().st_blocks * 512 >= 8 * 1024 * 4

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states.os, "posix_fallocate", full)
    told = r"states-0\.bin: 32,768 bytes of hidden states cannot be kept there: No space left on device \(free some"
    with pytest.raises(OutputError, match=told):
        kept(tmp_path / "other")


def test_states_that_know_more_than_the_journal_beside_them_begin_anew(tmp_path: Path) -> None:
    held = kept(tmp_path)
    held.write(1, torch.full((1, 5, 1024), 2.0), 1)
    held.passed(1)
    held.passed(2)
    del held
    states.restart_if_ahead(tmp_path, 2)
    assert kept(tmp_path).done == 2
    states.restart_if_ahead(tmp_path, 1)
    assert kept(tmp_path).done == 0
    states.restart_if_ahead(tmp_path / "nowhere", 0)
