"""Stages begin, go on after an interruption, and fail in the open."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def new_run(data_file: Path, tmp_path: Path, model: Any) -> Any:
    """Opens a run on the small data with the shared model, whose weights are put back behind the test."""
    from training.__main__ import Run, parser

    kept = {name: value.clone() for name, value in model.state_dict().items()}

    def open_run(*more: str) -> Any:
        command = ["train", "--data", str(data_file), "--out", str(tmp_path / "out"), "--device", "cpu", *more]
        run = Run(parser().parse_args(command))
        run.__dict__["built"] = (model, {})
        return run

    yield open_run
    model.load_state_dict(kept)
    model.requires_grad_(True)


def test_a_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    from training.schedule import Clock

    told: list[str] = []

    def clock(net: Any) -> Any:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
        return Clock("eye", 0.3, optimizer, 1e-2, {"net": net}, tmp_path / "eye.state", told.append), optimizer

    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    first, optimizer = clock(net)
    for step in first:
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        if step == 4:
            break
    first._save(0.2)
    torch.manual_seed(1)
    other = torch.nn.Linear(4, 4)
    second, again = clock(other)
    assert second.step == first.step == 4
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), other.parameters(), strict=True))
    assert again.state_dict()["state"][0]["step"] == optimizer.state_dict()["state"][0]["step"]
    assert told == ["eye: goes on at step 4, 0 s of 0 s done"]
    begun = time.monotonic()
    rates = []
    for _ in second:
        rates.append(again.param_groups[0]["lr"])
        time.sleep(0.01)
    assert time.monotonic() - begun < 0.2, "only what is left of its time"
    second.done()
    assert not (tmp_path / "eye.state").exists()


def test_the_eye_alone_changes(new_run: Any, model: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = new_run("--stage", "eye", "--eye-minutes", "0.03", "--eye-pictures", "8")
    run.data = replace(run.data, pictures=run.data.pictures[:200], picture_digits=run.data.picture_digits[:200])
    torch.save(model.thinker.state_dict(), run.work / "thinker.pt")
    run.run()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".visual." in name for name in changed)
    assert (run.work / "eye.pt").exists()
    assert "eye: the kernel of width" in (tmp_path / "out" / "log.txt").read_text()


def test_a_stage_without_what_it_needs_says_so(new_run: Any) -> None:
    with pytest.raises(SystemExit, match=r"thinker\.pt is missing: run its stage first"):
        new_run("--stage", "eye").run()


def test_the_export_is_read_back_bit_for_bit(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from training.architecture import build

    from training import export

    export.write(model, tmp_path)
    save_file({"judge.last": torch.ones(2).half()}, tmp_path / "helpers.safetensors")
    other = build(1)
    helpers = export.read(other, tmp_path)
    assert list(helpers) == ["judge.last"]
    written = load_file(tmp_path / "thinker.safetensors") | load_file(tmp_path / "speech.safetensors")
    again = export.checkpoint_tensors(other)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], written[name]) for name in written)


def test_a_step_that_cannot_be_recorded_runs_again_step_by_step(new_run: Any) -> None:
    run = new_run()
    calls: list[tuple[str, ...]] = []

    def start(stage: str, *more: str) -> Any:
        calls.append((stage, *more))
        status = 75 if stage == "thinker" and not more else 0
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])

    run.start = start
    run.watch({"thinker": start("thinker"), "codec": start("codec")})
    assert calls == [("thinker",), ("codec",), ("thinker", "--step-by-step")]
    run.start = lambda *_: subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="the stage talker failed"):
        run.watch({"talker": run.start("talker")})


def test_stages_named_on_the_command_line_are_known() -> None:
    from training.__main__ import SHARES, STAGES, Run, parser

    assert all(callable(getattr(Run, stage)) for stage in STAGES)
    options: argparse.Namespace = parser().parse_args(["train", "--data", "d", "--out", "o"])
    assert all(hasattr(options, f"{stage}_minutes") for stage in SHARES)
