"""Projections joined for the kernels: one storage, views of it, and no mistake about neighbours."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from omnifp4.decoding.decoder_weights import join, why_not_cut
from omnifp4.kernels.cuda.decoder_plan import Processor
from omnifp4.kernels.cuda.shapes import cut_stream


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made


def test_joined_once_and_found_again() -> None:
    weights = [torch.randn(rows, 32) for rows in (48, 16, 16)]
    parts = [linear(weight) for weight in weights]
    joined = join(parts)
    assert torch.equal(joined.weights, torch.cat(weights))
    assert all(torch.equal(part.weight, weight) for part, weight in zip(parts, weights, strict=True))
    assert join(parts).weights.data_ptr() == joined.weights.data_ptr() == parts[0].weight.data_ptr()


def test_neighbours_by_chance_are_not_joined() -> None:
    """Two storages may lie one behind the other: a view over both would reach outside of the first."""
    memory = bytearray(2 * 16 * 32 * 4)
    half = len(memory) // 2
    first, second = (torch.frombuffer(memory, dtype=torch.float32, count=half // 4, offset=at) for at in (0, half))
    first.normal_(), second.normal_()
    parts = [linear(first.view(16, 32)), linear(second.view(16, 32))]
    assert parts[1].weight.data_ptr() == parts[0].weight.data_ptr() + half
    assert parts[1].weight.untyped_storage().data_ptr() != parts[0].weight.untyped_storage().data_ptr()
    assert torch.equal(join(parts).weights, torch.cat([first, second]).view(32, 32))


@pytest.mark.parametrize("columns", [128, 384, 768, 2048])
@pytest.mark.parametrize("shared", [(232_448, 233_472), (101_376, 102_400)])
def test_a_stream_fits_its_processor(columns: int, shared: tuple[int, int]) -> None:
    cut = cut_stream(columns, fp4=True, blocks=4, most_stages=4, most_teams=3, shared_bytes=shared)
    assert cut.slices * cut.chunks * 128 == columns
    assert cut.stages >= 2 and cut.threads <= 1024
    assert cut.shared_bytes <= shared[0] and cut.blocks * cut.shared_bytes <= shared[1]


def test_what_a_gpu_cannot_hold_is_said_before_the_engine_is_made(tiny_artifact: Path) -> None:
    from omnifp4.runtime import load

    model = load(str(tiny_artifact), device="cpu", speech=False)
    model.thinker.get_decoder().config.hidden_size = 4096
    assert why_not_cut(model, Processor(132, 232_448, 233_472), 32) == ""
    assert why_not_cut(model, Processor(128, 101_376, 102_400), 1) == ""
    reason = why_not_cut(model, Processor(128, 101_376, 102_400), 32)
    assert reason == "4096 columns need more shared memory than 101376 bytes a block"
