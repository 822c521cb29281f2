"""Which stage comes when: processes of their own, begun before their turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from training.options import planned
from training.stages import Run
from training.steps import NOT_CAPTURED

NEEDS: dict[str, tuple[str, ...]] = {"thinker": (), "codec": (), "eye": ("thinker",), "talker": ("codec", "eye")}
"""What each stage waits for. Stages that wait for Python more than for the device run side by side."""
BEHIND = {"thinker": ("eye", "talker"), "codec": ("talker",), "eye": ("talker",), "talker": ()}
"""What has to follow each stage before the examination."""
RESULTS = {"thinker": "thinker", "codec": "code2wav", "eye": "eye", "talker": "talker"}
"""The weights that a stage writes last."""
BETWEEN_SECONDS = 10.0
"""For what a stage does besides training, for late runs."""
EXAMINE_SECONDS = 30.0
LEAST_PACE = 0.1


class Order:
    """Runs the stages that are not done, and the examination.

    Args:
        run: of the whole; its model is used for what is kept along the way and for the examination.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.options = run, run.options
        self.processes: dict[str, Any] = {}
        self.running: set[str] = set()
        self.again: set[str] = set()
        self.failed: list[str] = []

    def done(self, stage: str) -> bool:
        return self.run.result(RESULTS[stage]).exists() and stage not in self.running

    def go(self) -> None:
        """All of it.

        Raises:
            SystemExit: a stage failed twice, or too little time is left. What there is by then is kept.
        """
        todo: list[str] = []
        for stage in NEEDS:
            if not self.done(stage) or any(one in todo for one in NEEDS[stage]):
                # What was made of an older result of another stage is stale.
                self.run.result(RESULTS[stage]).unlink(missing_ok=True)
                todo.append(stage)
        before = signal.signal(signal.SIGTERM, _terminated)
        try:
            for stage in todo:
                if not NEEDS[stage]:
                    self.begin(stage)
            self.call(todo)
            _ = self.run.built
            for stage in todo:
                if stage not in self.processes:
                    self.begin(stage)
            while self.call(todo):
                time.sleep(0.2)
                self.look()
        finally:
            for process in self.processes.values():
                process.kill()
            signal.signal(signal.SIGTERM, before)
        if self.failed:
            raise SystemExit(f"the stage {self.failed[0]} failed; the same command goes on with what is done")
        if missing := [stage for stage in NEEDS if not self.done(stage)]:
            raise SystemExit(f"not done: {', '.join(missing)}; the same command goes on")
        self.run.examine()

    def begin(self, stage: str, *more: str) -> None:
        """Starts a stage's process, which gets ready and waits for its call; on a second GPU, if there is one, the codec's."""
        import torch

        environment = dict(os.environ)
        if stage == "codec" and torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = "1"
        command = [sys.executable, "-m", "training", *sys.argv[1:], "--stage", stage, "--on-call", *more]
        self.processes[stage] = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True)

    def call(self, todo: list[str]) -> bool:
        """Calls the stages whose time has come; whether there is anything to wait for."""
        for stage in todo:
            process = self.processes.get(stage)
            if process is None or stage in self.running or self.done(stage) or stage in self.failed:
                continue
            if all(self.done(one) for one in NEEDS[stage]):
                pace = self.pace(stage)
                # One that died while it got ready is found out as the others are.
                if process.poll() is None:
                    process.stdin.write(f"{self.run.begun} {pace}\n")
                    process.stdin.flush()
                self.running.add(stage)
        return bool(self.running)

    def pace(self, stage: str) -> float:
        """Times which a stage may train: 1, or less where the examination would come too late."""
        if self.options.most_minutes is None:
            return 1.0
        gone = time.monotonic() - self.run.begun
        left = 60 * self.options.most_minutes - gone - EXAMINE_SECONDS - BETWEEN_SECONDS * (1 + len(BEHIND[stage]))
        pace = left / sum(planned(self.options, one) for one in (stage, *BEHIND[stage]))
        if pace < LEAST_PACE:
            raise SystemExit(
                f"{stage}: {gone:.0f} s of {60 * self.options.most_minutes:.0f} s are gone, too little is left; the same"
                " command with more --most-minutes goes on with what is done"
            )
        return min(1.0, pace)

    def look(self) -> None:
        """Takes note of what has ended. A stage that failed is tried once more, step by step."""
        for stage in sorted(self.running):
            status = self.processes[stage].poll()
            if status is None:
                continue
            self.running.discard(stage)
            if self.done(stage):
                if status:
                    self.run.log(f"{stage}: ended with status {status}, but its weights are there")
                self.run.keep()
                continue
            why = "could not be recorded" if status == NOT_CAPTURED else f"ended with status {status}"
            self.run.log(f"{stage}: {why}" + ("" if stage in self.again else "; once more, step by step"))
            if stage in self.again:
                self.failed.append(stage)
                self.run.keep()
            else:
                self.again.add(stage)
                self.begin(stage, "--step-by-step")


def _terminated(*_: object) -> None:
    """Who ends the run, ends its stages: a process that is terminated would leave them at work."""
    raise SystemExit(128 + signal.SIGTERM)
