"""Every kernel of a decode step against its reference on fresh random input: odd sizes, all forms, idle rows, bits."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from omnifp4.kernels.cuda.decoder_plan import Tuning
from omnifp4.kernels.cuda.shapes import DecoderShape
from omnifp4.kernels.decode_check import Forms, LayerStep, LayerWeights, check_layer, list_is_wrong, wrong_parts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DEVICE = torch.device("cuda")
REAL = DecoderShape(hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8, inner=768)
SMALL = DecoderShape(hidden=256, heads=4, kv_heads=2, head_dim=64, experts=8, top_k=2, inner=128)
ODD = DecoderShape(hidden=384, heads=6, kv_heads=3, head_dim=128, experts=13, top_k=3, inner=640, normalise_top_k=False)
MANY = DecoderShape(hidden=512, heads=16, kv_heads=1, head_dim=128, experts=256, top_k=8, inner=256)
SHAPES = {"real": REAL, "small": SMALL, "odd": ODD, "many experts": MANY}


def layer_and_step(
    shape: DecoderShape, rows: int, *, seed: int = 0, context: int = 192, forms: Forms | None = None
) -> tuple[LayerWeights, LayerStep]:
    torch.manual_seed(seed)
    step = LayerStep(shape, rows, DEVICE, context=context, forms=forms)
    return LayerWeights(shape, rows * step.pages_per_slot, DEVICE, forms), step


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 31, 32])
@pytest.mark.parametrize("name", list(SHAPES))
def test_every_kernel_is_right(name: str, rows: int) -> None:
    layer, step = layer_and_step(SHAPES[name], rows, seed=rows)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


@pytest.mark.parametrize("forms", [Forms(False, True), Forms(True, False), Forms(False, False)], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("name", ["real", "odd"])
def test_wide_matrices(name: str, rows: int, forms: Forms) -> None:
    layer, step = layer_and_step(SHAPES[name], rows, forms=forms)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


@pytest.mark.parametrize("context", [0, 1, 63, 64, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("rows", [1, 8])
def test_contexts_short_and_split(rows: int, context: int) -> None:
    layer, step = layer_and_step(SMALL, rows, context=context)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(dependent=False),
        Tuning(gate_up_stages=2, gate_up_run=1, down_stages=2, down_run=1),
        Tuning(gate_up_stages=5, gate_up_run=4, gate_up_teams=2, gate_up_blocks=1, down_teams=3, down_blocks=2),
        Tuning(attention_blocks=512, min_stretch=64),
    ],
    ids=str,
)
def test_every_cut_gives_the_same(tuning: Tuning) -> None:
    torch.manual_seed(3)
    step = LayerStep(REAL, 13, DEVICE, tuning=tuning, context=700)
    layer = LayerWeights(REAL, 13 * step.pages_per_slot, DEVICE)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_twice_is_bit_equal(rows: int) -> None:
    """No result depends on the order in which blocks run."""
    layer, step = layer_and_step(REAL, rows, context=1500)
    start = torch.randn_like(step.residual)
    results = []
    for _ in range(20):
        step.residual.copy_(start)
        step.run_first_norm(layer)
        step.run(layer)
        results.append(step.residual.clone())
    assert all(torch.equal(one, results[0]) for one in results)
    assert torch.isfinite(results[0]).all()


def test_all_rows_to_the_same_experts() -> None:
    """More than eight tokens of an expert: several entries of the list."""
    layer, step = layer_and_step(REAL, 32)
    layer.router.zero_()  # equal logits: the lowest experts win
    errors = check_layer(step, layer)
    assert not wrong_parts({name: error for name, error in errors.items() if name != "router logits"}), errors
    assert step.routing.counts.tolist() == [8 * 4, 8]


@pytest.mark.parametrize("rows", [2, 8, 32])
def test_idle_rows_change_nothing(rows: int) -> None:
    """Rows without a sequence get no expert, and the others get what they get without them."""
    layer, step = layer_and_step(REAL, rows)
    start = torch.randn_like(step.residual)
    cache = [one.clone() for one in layer.cache]

    def run() -> torch.Tensor:
        for held, now in zip(cache, layer.cache, strict=True):
            now.copy_(held)
        step.residual.copy_(start)
        step.run_first_norm(layer)
        step.run(layer)
        return step.residual.clone()

    whole = run()
    idle = torch.arange(rows, device=DEVICE) % 2 == 1
    step.places[idle, 0] = -1
    step.heads.zero_()
    some = run()
    assert torch.equal(whole[~idle], some[~idle])
    assert (step.routing.experts[idle] == -1).all() and (step.routing.weights[idle] == 0).all()
    assert not list_is_wrong(step)
    assert all(
        torch.equal(a[step.pages[idle].flatten().long()], b[step.pages[idle].flatten().long()])
        for a, b in zip(layer.cache, cache, strict=True)
    )


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="rows is 33: 1 to 32"):
        LayerStep(SMALL, 33, DEVICE)
