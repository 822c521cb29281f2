"""Stages begin, go on after an interruption, and fail in the open."""

from __future__ import annotations

import argparse
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def new_run(data_file: Path, tmp_path: Path, model: Any) -> Any:
    """Opens a run on the small data with the shared model, whose weights are put back behind the test."""
    from training.options import parser
    from training.stages import Run

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
    run.eye()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".visual." in name for name in changed)
    assert (run.work / "eye.pt").exists()
    assert "eye: the kernel of width" in (tmp_path / "out" / "log.txt").read_text()


def test_a_stage_without_what_it_needs_says_so(new_run: Any) -> None:
    with pytest.raises(SystemExit, match=r"thinker\.pt is missing: run its stage first"):
        new_run("--stage", "eye").eye()


def test_the_export_is_read_back_bit_for_bit(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from training.architecture import build

    from training import export

    export.write(model, {"judge": torch.nn.Linear(2, 1, bias=False)}, tmp_path)
    other = build(1)
    helpers = export.read(other, tmp_path)
    assert list(helpers) == ["judge.weight"]
    written = load_file(tmp_path / "thinker.safetensors") | load_file(tmp_path / "speech.safetensors")
    again = export.checkpoint_tensors(other)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], written[name]) for name in written)


class Stages:
    """Stands for the processes of stages: which were begun and called, in their order, and how they end."""

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch, ends: dict[str, list[int]]) -> None:
        from training import order

        self.run, self.ends, self.told = run, ends, []
        self.order = order.Order(run)
        monkeypatch.setattr(self.order, "begin", self.begin)
        monkeypatch.setattr(run, "keep", lambda: self.told.append("keep"))
        monkeypatch.setattr(run, "examine", lambda: self.told.append("examine"))
        monkeypatch.setattr(order.time, "sleep", lambda _: None)

    def begin(self, stage: str, *more: str) -> None:
        from training.order import RESULTS

        self.told.append(" ".join(("begin", stage, *more)))
        status = self.ends[stage].pop(0) if stage in self.ends else 0
        result = self.run.result(RESULTS[stage])
        told = self.told

        class Process:
            called = False

            def write(self, line: str) -> None:
                self.called = True
                told.append(f"call {stage}")
                if status == 0:
                    result.touch()

            flush = staticmethod(lambda: None)

            def kill(self) -> None:
                told.append(f"kill {stage}")

            def poll(self) -> int | None:
                return status if self.called else None

            @property
            def stdin(self) -> Any:
                return self

        self.order.processes[stage] = Process()


def test_stages_are_called_when_what_they_need_is_done(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(new_run(), monkeypatch, {})
    stages.order.go()
    told = stages.told
    assert told[:2] == ["begin thinker", "begin codec"]
    assert told.index("call eye") > told.index("call thinker")
    assert told.index("call talker") > max(told.index("call eye"), told.index("call codec"))
    assert told.index("begin talker") < told.index("call eye"), "a stage gets ready while others train"
    ended = [one for one in told if not one.startswith("kill ")]
    assert ended[-2:] == ["keep", "examine"]
    again = Stages(stages.run, monkeypatch, {})
    again.order.go()
    assert again.told == ["examine"], "what is done is not done again"


def test_who_terminates_the_run_ends_its_stages(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(new_run(), monkeypatch, {})
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stages.order, "look", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        stages.order.go()
    assert ended.value.code == 128 + signal.SIGTERM
    assert {"kill thinker", "kill codec"} <= set(stages.told) and "examine" not in stages.told
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_made_of_an_older_result_is_made_again(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(new_run(), monkeypatch, {})
    stages.order.go()
    stages.run.result("eye").unlink()
    again = Stages(stages.run, monkeypatch, {})
    again.order.go()
    assert [one for one in again.told if one.startswith("call")] == ["call eye", "call talker"]


def test_only_the_rest_of_a_late_stage_is_shortened(tmp_path: Path) -> None:
    from training.schedule import Clock

    net = torch.nn.Linear(4, 4)

    def clock(pace: float) -> Any:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
        return Clock("eye", 100.0, optimizer, 1e-2, {"net": net}, tmp_path / "eye.state", lambda _: None, pace)

    first = clock(1.0)
    first._save(80.0)
    assert first.seconds == 100.0
    assert clock(0.5).seconds == 90.0, "80 are done, and half of the other 20"


def test_a_step_that_cannot_be_recorded_runs_again_step_by_step(
    new_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = Stages(new_run(), monkeypatch, {"thinker": [75, 0]})
    stages.order.go()
    assert "begin thinker --step-by-step" in stages.told
    assert stages.told[-1] == "examine"
    assert "thinker: could not be recorded; once more, step by step" in (tmp_path / "out" / "log.txt").read_text()


def test_a_stage_that_fails_twice_ends_the_run_and_keeps_the_others(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(new_run(), monkeypatch, {"codec": [3, 3]})
    with pytest.raises(SystemExit, match="the stage codec failed"):
        stages.order.go()
    assert "call eye" in stages.told
    assert "call talker" not in stages.told
    assert "examine" not in stages.told
    assert stages.told.count("keep") == 3


def test_a_late_run_trains_shorter_or_says_that_it_is_too_late(new_run: Any) -> None:
    from training.order import Order

    run = new_run("--minutes", "8", "--most-minutes", "9")
    assert Order(run).pace("codec") == 1.0
    run.begun -= 4 * 60
    assert 0.3 < Order(run).pace("thinker") < 0.6
    run.begun -= 4 * 60
    with pytest.raises(SystemExit, match="thinker: 480 s of 540 s are gone"):
        Order(run).pace("thinker")


def test_what_is_kept_along_the_way_can_be_gone_on_from(new_run: Any, model: Any, tmp_path: Path) -> None:
    from training.architecture import build

    from training import export

    run = new_run()
    torch.save({name: value + 1 for name, value in model.thinker.state_dict().items()}, run.result("thinker"))
    run.keep()
    other = build(1)
    assert export.read(other, tmp_path / "out" / "unfinished") == {}
    name = "lm_head.weight"
    kept = other.thinker.state_dict()[name]
    assert torch.equal(kept, torch.load(run.result("thinker"))[name].bfloat16().float())


def test_stages_named_on_the_command_line_are_known() -> None:
    from training.options import SHARES, STAGES, parser
    from training.order import BEHIND, NEEDS, RESULTS
    from training.stages import Run

    assert all(callable(getattr(Run, stage)) for stage in STAGES)
    assert {*NEEDS, "examine"} == {*BEHIND, "examine"} == {*RESULTS, "examine"} == set(STAGES)
    options: argparse.Namespace = parser().parse_args(["train", "--data", "d", "--out", "o"])
    assert all(hasattr(options, f"{stage}_minutes") for stage in SHARES)
