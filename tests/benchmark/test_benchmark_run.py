"""A whole measurement: what it records, in which form, and what it refuses."""

from __future__ import annotations

import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_runs import QUICK

import omnifp4
from omnifp4.benchmark import measurement, run
from omnifp4.cli import main
from omnifp4.decoding import EngineFull, ModuleEngine
from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.bench import BenchReceipt
from omnifp4.report.bench_card import bench_text


def test_every_figure_is_there(measured: BenchReceipt) -> None:
    assert measured.passed
    assert measured.against is not None
    for one in (measured.model, measured.against):
        assert {(row.batch, row.prompt_tokens) for row in one.decode} == {(1, 12), (2, 12), (1, 40), (2, 40)}
        for row in one.decode:
            speed = row.tokens_per_second
            assert speed is not None and speed.repeats == 3
            assert 0 < speed.least <= speed.median <= speed.most
            assert row.fraction == pytest.approx(speed.median / row.bound_tokens_per_second)
            assert row.bound_tokens_per_second == pytest.approx(
                row.batch * measured.machine.copy_bytes_per_second.median / row.step_bytes
            )
            assert row.prompt_tokens <= row.mean_context <= row.prompt_tokens + 24
        assert [row.prompt_tokens for row in one.prefill] == [8]
        first, rate = one.prefill[0].first_token_seconds, one.prefill[0].tokens_per_second
        assert first is not None and rate is not None and rate.median == pytest.approx(8 / first.median)
        assert one.speech is not None and one.speech.real_time_factor is not None
        assert [row.batch for row in one.routing] == [1, 2]
        assert all(row.measured for row in one.routing)
        # One token reads exactly the experts it chooses; two tokens at least as many, at most twice.
        assert one.routing[0].distinct_experts == 2
        assert 2 < one.routing[1].distinct_experts < 4
        assert [row.to_tokens for row in one.cache] == [40, 40]
        assert one.make_seconds is not None and one.load_seconds is None
    assert measured.model.weights.startswith("NVFP4: attention, experts")
    assert measured.against.weights == "BF16"


def test_memory_is_that_of_the_parts(measured: BenchReceipt) -> None:
    assert measured.against is not None
    model, reference = measured.model.memory, measured.against.memory
    assert model.weight_bytes == sum(model.weights.values())
    assert {part for part in model.weights if model.weights[part] != reference.weights[part]} == {
        "experts",
        "attention",
    }
    # 4.5 bits for 16, and a float for each of: 4 projections of 4 layers; gate with up, and down, of 8 experts of 4 layers.
    assert model.weights["attention"] == reference.weights["attention"] * 4.5 / 16 + 4 * 4 * 4
    assert model.weights["experts"] == reference.weights["experts"] * 4.5 / 16 + 4 * 8 * 2 * 4


def test_ratios(measured: BenchReceipt) -> None:
    assert measured.against is not None
    ratios = {row.figure: row for row in measured.ratios}
    memory = ratios["memory of weights, bytes"]
    assert memory.ratio == pytest.approx(measured.against.memory.weight_bytes / measured.model.memory.weight_bytes)
    speed = ratios["decode batch 2 context 40, tok/s"]
    assert speed.ratio == pytest.approx(speed.model / speed.reference)
    factor = ratios["speech, real-time factor"]
    assert factor.ratio == pytest.approx(factor.reference / factor.model)


def test_record_survives_json_and_refuses_what_it_does_not_know(measured: BenchReceipt) -> None:
    text = measured.model_dump_json()
    assert BenchReceipt.model_validate_json(text) == measured
    document = json.loads(text)
    assert document["receipt"] == "bench" and document["version"] == 1
    with pytest.raises(ValueError, match="surprise"):
        BenchReceipt.model_validate(document | {"surprise": 1})


def test_card(measured: BenchReceipt) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(bench_text(measured))
    shown = console.export_text()
    for part in (
        "copy bandwidth",
        "bound, tok/s",
        "tier optimal",
        "real-time factor",
        "times better",
        "every check passed",
    ):
        assert part in shown
    assert f"{measured.model.routing[1].distinct_experts:.1f} experts a layer" in shown


def test_a_checkpoint_on_the_command_line(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "1", "--context", "12", "--prefill", "8", "--new-tokens", "16", "--cell-seconds", "0.5"]
    record = tmp_path / "bench.json"
    arguments = [
        "omnifp4",
        "bench",
        str(tiny_artifact),
        *options,
        "--device",
        "cpu",
        "--json",
        "--receipt",
        str(record),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        main.run()
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert record.read_text() == printed
    receipt = BenchReceipt.model_validate_json(printed)
    assert receipt.model.load_seconds is not None and receipt.model.make_seconds is None
    assert receipt.settings.parts == "thinker"
    assert {"audio tower", "vision tower"} <= receipt.model.memory.weights.keys()
    assert "talker" not in receipt.model.memory.weights


def test_the_first_model_is_gone_before_the_second_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, seen = run.open_subject, []

    def watching(*arguments: Any, **named: Any) -> Any:
        assert all(model() is None for model in seen)
        loaded = opened(*arguments, **named)
        seen.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(run, "open_subject", watching)
    receipt = omnifp4.bench(synthetic="tiny", against="bf16", **(QUICK | {"batch": (1,)}))
    assert receipt.against is not None and len(seen) == 2


class Small(ModuleEngine):
    """Takes one sequence at once, and has no memory for more."""

    def __init__(self, *arguments: Any, most_sequences: int = 1, **named: Any) -> None:
        if most_sequences > 1:
            raise EngineFull("no room for the cache")
        super().__init__(*arguments, most_sequences=1, **named)


class Single(ModuleEngine):
    """Takes one sequence at once, and says so."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.most_sequences = 1


def choosing(kind: Any) -> Any:
    def choose(
        model: Any, requested: str = "auto", *, most_sequences: int = 1, context_tokens: int | None = None
    ) -> Any:
        return kind(model, most_sequences=most_sequences, context_tokens=context_tokens, reason="for the test")

    return choose


def test_what_finds_no_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "choose_engine", choosing(Small))
    one, two = omnifp4.bench(synthetic="tiny", **QUICK).model.decode
    assert one.tokens_per_second is not None
    assert two.tokens_per_second is None and two.not_measured == "no room for the cache"


def test_a_batch_larger_than_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "choose_engine", choosing(Single))
    with pytest.raises(OmniFP4Error, match="a batch of 2 is more than the engine modules takes at once"):
        omnifp4.bench(synthetic="tiny", **QUICK)


@pytest.mark.parametrize(("changes", "told"), [
    ({"batch": "1,x"}, "batch is '1,x'"),
    ({"batch": (0,)}, "batch is"),
    ({"batch": (4096,)}, "at most 1024"),
    ({"context": (1 << 20,)}, "do not fit the model's"),
    ({"prefill": (1 << 20,)}, "does not fit the model's"),
    ({"new_tokens": 3}, "at least 16"),
    ({"repeats": 2}, "at least 3"),
    ({"parts": "talker"}, "allowed: text, thinker, all"),
    ({"engine": "vllm"}, "there is no engine"),
    ({"engine": "cuda-graph"}, "the engine cuda-graph cannot run"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"format": "int8"}, "format is 'int8'"),
    ({"layers": 0}, "layers is 0"),
    ({"synthetic": "huge"}, "known: tiny"),
    ({"model": "somewhere"}, "bench needs one model"),
    ({"synthetic": None}, "bench needs one model"),
    ({"synthetic": None, "model": "/nowhere/at/all"}, "/nowhere/at/all"),
])  # fmt: skip
def test_refusals(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OmniFP4Error) as refused:
        omnifp4.bench(**({"synthetic": "tiny"} | QUICK | changes))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
