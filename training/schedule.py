"""A training loop bounded by the clock: the learning rate follows the share of the time that has gone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SAVE_SECONDS = 60.0
"""How often the state of a stage is written, so that an interrupted run goes on."""


class Clock:
    """Steps of one stage.

    Args:
        stage: its name, for the log.
        seconds: how long it may train, over all its runs.
        optimizer: whose learning rate is set.
        rate: the highest learning rate.
        modules: what is saved beside the optimizer, by name.
        state: file for the state of an interrupted stage; removed at the end.
        log: a function that prints one line.
        pace: times what is left of the seconds, where the run is late.
    """

    def __init__(
        self,
        stage: str,
        seconds: float,
        optimizer: Any,
        rate: float,
        modules: dict[str, Any],
        state: Path,
        log: Any,
        pace: float = 1.0,
    ) -> None:
        self.stage, self.seconds, self.optimizer, self.rate = stage, seconds, optimizer, rate
        self.modules, self.state, self.log = modules, state, log
        self.step, self._before = 0, 0.0
        if state.exists():
            saved = torch.load(state, map_location="cpu", weights_only=True)
            self.step, self._before = saved["step"], saved["seconds"]
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved["optimizer"])
            # A captured step reads its rate from this very tensor.
            for group, own in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = own
            for name, module in modules.items():
                module.load_state_dict(saved[name])
            log(f"{stage}: goes on at step {self.step}, {self._before:.0f} s of {seconds:.0f} s done")
        # What was trained before is trained: only the rest is shortened, so that the rate still comes down.
        self.seconds = self._before + pace * max(0.0, seconds - self._before)

    def __iter__(self) -> Iterator[int]:
        begun = saved = told = time.monotonic()
        while True:
            now = time.monotonic()
            share = (self._before + now - begun) / self.seconds
            if share >= 1:
                break
            rate = self.rate * min(1.0, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            if now - saved > SAVE_SECONDS:
                self._save(self._before + now - begun)
                saved = time.monotonic()
            self.tell = now - told > min(10.0, self.seconds / 8) or self.step == 0
            if self.tell:
                told = now
            yield self.step
            self.step += 1
        self.log(f"{self.stage}: {self.step} steps in {self.seconds:.0f} s")

    def say(self, values: dict[str, Any]) -> None:
        """Logs the values of this step."""
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        told = ", ".join(f"{name} {value:.3f}" for name, value in plain.items())
        self.log(f"{self.stage}: step {self.step}, {told}")

    def _save(self, seconds: float) -> None:
        partial = self.state.with_suffix(".partial")
        contents = {name: module.state_dict() for name, module in self.modules.items()}
        torch.save(
            {"step": self.step, "seconds": seconds, "optimizer": self.optimizer.state_dict(), **contents}, partial
        )
        partial.replace(self.state)

    def done(self) -> None:
        """The stage is trained to its end: its state is of no more use."""
        self.state.unlink(missing_ok=True)
