"""`calibrate --gradients`: squared gradients in the file, beside the statistics and only when they are asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

torch = pytest.importorskip("torch")

from omnifp4.calibration import capture  # noqa: E402
from omnifp4.calibration.statistics import open_statistics  # noqa: E402
from omnifp4.errors import OmniFP4Error  # noqa: E402
from omnifp4.report.calibration import calibration_text  # noqa: E402

EXPERTS = "thinker.model.layers.1.mlp.experts"
QUERY = "thinker.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def with_gradients(tiny_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    import omnifp4

    out = tmp_path_factory.mktemp("gradients") / "statistics.safetensors"
    return out, omnifp4.calibrate(tiny_omni, out, samples=4, speech=False, gradients=True)


def test_every_weight_of_the_thinker_has_its_factors(
    with_gradients: tuple[Path, Any], tiny_omni: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both factors have the same sum, which is that of the squares themselves."""
    from omnifp4.calibration.gradients import answer_positions
    from omnifp4.calibration.preparation import prepare
    from omnifp4.segments.gradients import run_gradients

    path, receipt = with_gradients
    prepared = prepare(
        tiny_omni,
        "bundled",
        samples=4,
        seed=0,
        device="cpu",
        dtype="bfloat16",
        max_failed=0.0,
        progress=lambda *_: None,
    )
    whole: dict[str, float] = {}

    def on_layer(number: int, _: Any, squares: Any) -> None:
        if number == 1:
            whole[QUERY] = float(squares[QUERY.removesuffix(".weight")]["weight"].sum())
            whole["gate_proj"], whole["up_proj"] = (
                float(half.sum()) for half in squares[EXPERTS]["gate_up_proj"].chunk(2, dim=1)
            )
            whole["down_proj"] = float(squares[EXPERTS]["down_proj"].sum())

    positions = [answer_positions(one) for one in prepared.sequences]
    count = run_gradients(
        prepared.checkpoint, prepared.sequences, positions, on_layer, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert receipt.gradient_positions == count == sum(map(len, positions))
    with open_statistics(path, tiny_omni) as known:
        assert known.receipt == receipt
        query = known.gradient(QUERY)
        assert (query.rows.shape, query.columns.shape) == ((256,), (128,))
        assert float(query.rows.sum()) == pytest.approx(float(query.columns.sum()), rel=1e-5)
        assert float(query.rows.sum()) == pytest.approx(whole[QUERY] / count, rel=1e-5)
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [f"{EXPERTS}.{number}.{part}.weight" for number in range(8)]
            total = sum(float(known.gradient(name).rows.sum()) for name in names)
            assert total == pytest.approx(whole[part] / count, rel=1e-4)
            assert any(known.gradient(name).columns.any() for name in names)
        assert known.of(QUERY).tokens > 0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(calibration_text(receipt, "out"))
    assert f"squared gradients: of {count:,} positions" in console.export_text()


def test_answers_are_what_counts(tiny_omni: Path) -> None:
    from types import SimpleNamespace

    from omnifp4.calibration.gradients import answer_positions

    ids = torch.zeros(1, 10, dtype=torch.int64)
    answered = SimpleNamespace(tensors={"input_ids": ids}, prompt_tokens=7)
    assert answer_positions(answered).tolist() == [6, 7, 8]  # type: ignore[arg-type]
    silent = SimpleNamespace(tensors={"input_ids": ids}, prompt_tokens=10)
    assert answer_positions(silent).tolist() == list(range(9))  # type: ignore[arg-type]


def test_a_file_without_them_says_so(captured: tuple[Path, Any]) -> None:
    path, receipt = captured
    assert receipt.gradient_positions == 0
    with open_statistics(path) as known, pytest.raises(OmniFP4Error, match=r"no gradients of .*--gradients collects"):
        known.gradient(QUERY)


def test_an_interrupted_pass_keeps_the_statistics(
    with_gradients: tuple[Path, Any], tiny_omni: Path, calibrate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "statistics.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(capture, "collect_gradients", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_omni, out, gradients=True)
    assert not out.exists()
    with pytest.raises(OmniFP4Error):
        calibrate(tiny_omni, out, resume=True)
    receipt = calibrate(tiny_omni, out, gradients=True, resume=True)
    assert receipt.resumed_layers == 4
    assert receipt.tensors == with_gradients[1].tensors
