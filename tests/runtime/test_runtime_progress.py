"""A load tells how far it is, and where it stands when nothing moves."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifp4.runtime.progress import LoadProgress, component_of
from omnifp4.runtime.stall import available_bytes, file_system, likely_causes


def test_bytes_are_counted_and_told(transformers: Any, artifact: Callable[..., Path]) -> None:
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.runtime import load

    told: list[tuple[int, int, str]] = []
    load(artifact(), progress=lambda *row: told.append(row))
    entries = open_checkpoint(artifact()).tensors
    scalars = sum(entry.nbytes for name, entry in entries.items() if name.endswith("weight_scale_2"))
    assert told[-1][0] == told[-1][1] == sum(entry.nbytes for entry in entries.values()) - scalars
    assert {name for _, _, name in told} == {name for name in entries if not name.endswith("weight_scale_2")}


def test_line_of_progress(transformers: Any, artifact: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    from omnifp4.runtime import load

    load(artifact(), progress=True)
    last = capfd.readouterr().err.rstrip().split("\r")[-1]
    assert last.startswith("loading 0.01 of 0.01 GB  100%")
    assert "GB/s" in last
    assert "s left" in last
    load(artifact())
    assert "loading" not in capfd.readouterr().err, "no progress where standard error is no terminal"


def test_rate_and_time_left() -> None:
    progress = LoadProgress()
    progress.expect(4_000_000_000)
    progress._begin -= 2.0
    with progress.reading("a.safetensors", "talker.code_predictor.lm_head.0.weight", 1_000_000_000):
        pass
    line = progress.line()
    assert line.startswith("loading 1.00 of 4.00 GB   25%  0.50 GB/s  6 s left  code predictor")


@pytest.mark.parametrize(
    ("tensor", "component"),
    [
        ("thinker.model.layers.3.mlp.experts.5.gate_proj.weight", "experts"),
        ("talker.model.layers.3.mlp.experts.5.gate_proj.weight", "talker"),
        ("thinker.visual.blocks.0.mlp.linear_fc1.weight", "vision tower"),
        ("thinker.model.layers.3.self_attn.q_proj.weight", "layers"),
        ("", ""),
    ],
)
def test_component(tensor: str, component: str) -> None:
    assert component_of(tensor) == component


def test_a_slow_reader_is_told_of(
    transformers: Any, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from omnifp4.checkpoint.reader import CheckpointReader
    from omnifp4.runtime import load

    slow, read_into = "thinker.model.layers.2.self_attn.o_proj.weight", CheckpointReader.read_into

    def hang(self: Any, entry: Any, buffer: Any, offset: int = 0) -> None:
        if entry.name == slow:
            time.sleep(0.9)
        read_into(self, entry, buffer, offset)

    monkeypatch.setattr(CheckpointReader, "read_into", hang)
    load(artifact(), stall_seconds=0.25)
    text = capfd.readouterr().err
    assert re.search(r"the load has stood still for \d s at: loading", text)
    assert f"reading {slow} (0.0 MB) of {artifact()}/model.safetensors for" in text
    assert "likely causes:" in text
    assert "the disk is slow or busy" in text
    assert "Python stack of the loading thread:" in text
    assert "Python stack of the reader:" in text
    assert "in hang" in text
    # Told after 0.25 s, and again after 0.5 s more: not every tick.
    assert 1 <= text.count(f"reading {slow}") <= 3


def test_a_stall_outside_of_reading() -> None:
    stream = io.StringIO()
    progress = LoadProgress(stream=stream, stall_seconds=0.1)
    with progress.running():
        time.sleep(0.25)
    assert progress.stalls >= 1
    assert "no file is being read" in stream.getvalue()
    assert "test_a_stall_outside_of_reading" in stream.getvalue()


def test_nothing_is_told_while_it_moves() -> None:
    stream = io.StringIO()
    progress = LoadProgress(stream=stream, stall_seconds=0.6)
    with progress.running():
        for _ in range(10):
            with progress.reading("a", "b", 1):
                time.sleep(0.08)
    assert progress.stalls == 0
    assert stream.getvalue() == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "omnifp4-load-watch"]


def test_short_memory_is_a_likely_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes() is None or available_bytes() > 1_000_000
    monkeypatch.setattr("omnifp4.runtime.stall.available_bytes", lambda: 300_000_000)
    assert likely_causes([])[0].startswith("memory is short (0.3 GB free)")
    monkeypatch.setattr("omnifp4.runtime.stall.file_system", lambda path: "nfs4")
    from omnifp4.runtime.progress import Reading

    causes = likely_causes([(1, Reading("/mnt/a.safetensors", "b", 1, 0.0))])
    assert any("is on nfs4, a network file system" in cause for cause in causes)


def test_file_system_of_a_path(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self/status")) in ("proc", "")
    assert isinstance(file_system(tmp_path / "x"), str)
