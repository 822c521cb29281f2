"""Right before fast: an engine that is wrong, unsteady or broken gets no figure of speed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from small_runs import QUICK

import omnifp4
from omnifp4.benchmark import measurement
from omnifp4.cli import main
from omnifp4.decoding import DecodingError, ModuleEngine, Sequence
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.bench import BenchReceipt, TierVerdict


class Wrong(ModuleEngine):
    """Now and then another token than the model's."""

    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        chosen = list(sequences or ())
        super().step(chosen)
        for one in chosen:
            if len(one.tokens) == 9:
                one.tokens[-1] = (one.tokens[-1] + 7) % 2000


class Unsteady(ModuleEngine):
    """Tokens as from a race."""

    random = random.Random(0)

    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        chosen = list(sequences or ())
        super().step(chosen)
        for one in chosen:
            one.tokens[-1] = self.random.randrange(2000)


class Broken(ModuleEngine):
    """Logits that are not numbers, as an engine tells them."""

    def step(self, sequences: Iterable[Sequence] | None = None) -> None:
        raise DecodingError("the model's output is not finite after 13 tokens")


def use(monkeypatch: pytest.MonkeyPatch, kind: Callable[..., Any]) -> None:
    def choose(
        model: Any, requested: str = "auto", *, most_sequences: int = 1, context_tokens: int | None = None
    ) -> Any:
        return kind(model, most_sequences=most_sequences, context_tokens=context_tokens, reason="for the test")

    monkeypatch.setattr(measurement, "choose_engine", choose)


def failed(receipt: BenchReceipt) -> set[str]:
    return {check.name for check in receipt.model.checks if check.verdict is Verdict.FAIL}


def assert_no_speed(receipt: BenchReceipt) -> None:
    assert not receipt.passed
    assert receipt.model.decode == () and receipt.model.prefill == () and receipt.model.speech is None
    assert {tier.verdict for tier in receipt.model.tiers} == {TierVerdict.NOT_MEASURED}
    assert receipt.model.memory.weight_bytes > 0


@pytest.mark.parametrize(("kind", "checks"), [
    (Wrong, {"tokens.12"}), (Unsteady, {"tokens.12", "repeat.12"}), (Broken, {"tokens.12"}),
])  # fmt: skip
def test_red_check_hides_every_speed(monkeypatch: pytest.MonkeyPatch, kind: Any, checks: set[str]) -> None:
    use(monkeypatch, kind)
    receipt = omnifp4.bench(synthetic="tiny", **QUICK)
    assert failed(receipt) == checks
    assert_no_speed(receipt)


def test_weights_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from omnifp4.benchmark import run

    opened = run.open_subject

    def damaged(*arguments: Any, **named: Any) -> Any:
        loaded = opened(*arguments, **named)
        with torch.no_grad():
            loaded.model.thinker.lm_head.weight[5] = float("nan")
        return loaded

    monkeypatch.setattr(run, "open_subject", damaged)
    assert_no_speed(omnifp4.bench(synthetic="tiny", **QUICK))


def test_exit_status_of_a_red_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(monkeypatch, Wrong)
    arguments = ["bench", "--synthetic", "tiny", "--parts", "text", "--batch", "1", "--context", "12", "--prefill", "8"]
    monkeypatch.setattr("sys.argv", ["omnifp4", *arguments, "--new-tokens", "16", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        main.run()
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "A CHECK FAILED" in shown and "the modules say" in shown
    assert "prefill, tok/s" not in shown and "bound, tok/s" not in shown

    monkeypatch.setattr("sys.argv", ["omnifp4", *arguments, "--new-tokens", "16", "--device", "cpu", "--json"])
    with pytest.raises(SystemExit) as end:
        main.run()
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
