"""The decode kernels' own sources on a CPU: whole layers against the reference, and what threads may not do.

What an emulation cannot show: speed, registers, and the order in which another block sees memory. For these there are
the tests on a GPU.
"""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from decode_emulator import EmulationError, Emulator, compiler, use, without_ptx

from omnifp4.kernels import decode_reference as reference
from omnifp4.kernels.cuda.decoder_plan import Processor, Tuning
from omnifp4.kernels.cuda.launching import wanted
from omnifp4.kernels.cuda.prompt import PromptKernels
from omnifp4.kernels.cuda.sampling import SamplingKernels
from omnifp4.kernels.cuda.shapes import PAGE, DecoderShape
from omnifp4.kernels.decode_check import (
    EPS,
    Forms,
    LayerStep,
    LayerWeights,
    check_layer,
    list_is_wrong,
    wrong_parts,
)

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++, or what CXX names) on Linux"),
    pytest.mark.xdist_group("decode_emulated"),  # sources are compiled once
]

CPU = torch.device("cpu")
SMALL = DecoderShape(hidden=256, heads=4, kv_heads=2, head_dim=64, experts=8, top_k=2, inner=128)
ODD = DecoderShape(hidden=384, heads=8, kv_heads=1, head_dim=128, experts=13, top_k=3, inner=384, normalise_top_k=False)
MANY = DecoderShape(hidden=256, heads=16, kv_heads=1, head_dim=64, experts=70, top_k=5, inner=256)
FEW_BLOCKS = Processor(3, 232_448, 233_472)
"""An H200's shared memory and so few multiprocessors that a team of warps has several runs."""
CONTEXTS = (700, 0, 64, 200, 1, 63)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Sources are compiled once for all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulator(built: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    use(built, monkeypatch, FEW_BLOCKS)
    built.forget()
    built.seed = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other tests its threads would only wait for each other
    yield built
    torch.set_num_threads(threads)
    built.edit = lambda _, text: text


def layer_and_step(
    shape: DecoderShape, rows: int, *, tuning: Tuning | None = None, forms: Forms | None = None, seed: int = 0
) -> tuple[LayerWeights, LayerStep]:
    """Rows of all lengths; behind the end of each the cache holds infinities, and zero times these is no number."""
    torch.manual_seed(seed)
    tuning = tuning or Tuning(attention_blocks=3 * rows * shape.kv_heads)
    step = LayerStep(shape, rows, CPU, context=max(CONTEXTS), tuning=tuning, forms=forms)
    layer = LayerWeights(shape, rows * step.pages_per_slot, CPU, forms)
    for row in range(rows):
        length = CONTEXTS[row % len(CONTEXTS)]
        step.lengths[row] = length
        step.places[row, 1], step.places[row, 2] = length, length + 3 * (length > 0)
        for place in range(step.pages_per_slot):
            for cache in layer.cache:
                cache[step.pages[row, place].long(), :, max(0, min(PAGE, length - place * PAGE)) :] = float("inf")
    return layer, step


# All orders of blocks and threads appear: the seed's remainder by 3 says how the next thread is chosen.
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 13, 32])
@pytest.mark.parametrize("shape", [SMALL, ODD], ids=["small", "odd"])
def test_every_kernel_is_right(emulator: Emulator, shape: DecoderShape, rows: int) -> None:
    emulator.seed = rows % 3 + (shape is ODD)
    layer, step = layer_and_step(shape, rows, seed=rows)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors
    assert not step.splits.done.any() and not step.routing.done.any()


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_many_experts_and_sixteen_heads_of_a_group(emulator: Emulator, rows: int) -> None:
    layer, step = layer_and_step(MANY, rows)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


@pytest.mark.parametrize("forms", [Forms(False, True), Forms(True, False)], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_wide_matrices(emulator: Emulator, rows: int, forms: Forms) -> None:
    layer, step = layer_and_step(SMALL, rows, forms=forms)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(gate_up_stages=2, gate_up_run=1, down_stages=2, down_run=1),
        Tuning(gate_up_stages=5, gate_up_run=4, gate_up_teams=2, gate_up_blocks=1, down_teams=3, down_blocks=2),
        Tuning(attention_blocks=512, min_stretch=64),
    ],
    ids=["shallow", "deep", "splits"],
)
def test_every_cut_gives_the_same(emulator: Emulator, tuning: Tuning) -> None:
    layer, step = layer_and_step(ODD, 5, tuning=tuning)
    errors = check_layer(step, layer)
    assert not wrong_parts(errors), errors


def test_no_result_depends_on_the_order_of_blocks_and_threads(emulator: Emulator) -> None:
    """Two layers in a row, as a step has them: what a kernel reads before its wait is never the kernel ahead's."""
    for rows in (1, 10):
        layer, step = layer_and_step(SMALL, rows)
        start = torch.randn_like(step.residual)
        results = []
        for seed in range(6):
            emulator.forget()
            emulator.seed = seed
            step.residual.copy_(start)
            step.run_first_norm(layer)
            step.run(layer)
            step.run(layer)
            results.append(step.residual.clone())
        assert all(torch.equal(one, results[0]) for one in results)
        assert torch.isfinite(results[0]).all()
        per_layer = ["linear", "attention", "linear", "router", "gate_up_one", "down_one"]
        if rows > 1:
            per_layer = ["linear", "attention", "linear", "rms_norm", "router", "gate_up", "down", "rms_norm"]
        assert emulator.launched == ["rms_norm"] * (rows > 1) + per_layer * 2


def test_all_rows_to_the_same_experts(emulator: Emulator) -> None:
    """More than eight tokens of an expert: several entries of the list."""
    layer, step = layer_and_step(SMALL, 32)
    layer.router.zero_()  # equal logits: the lowest experts win
    errors = check_layer(step, layer)
    assert not wrong_parts({name: error for name, error in errors.items() if name != "router logits"}), errors
    assert step.routing.counts.tolist() == [2 * 4, 2]


@pytest.mark.parametrize("rows", [2, 13])
def test_idle_rows_change_nothing(emulator: Emulator, rows: int) -> None:
    layer, step = layer_and_step(SMALL, rows)
    start = torch.randn_like(step.residual)
    cache = [one.clone() for one in layer.cache]

    def run() -> Any:
        for held, now in zip(cache, layer.cache, strict=True):
            now.copy_(held)
        emulator.forget()
        step.residual.copy_(start)
        step.run_first_norm(layer)
        step.run(layer)
        return step.residual.clone()

    whole = run()
    idle = torch.arange(rows) % 2 == 1
    step.places[idle, 0] = -1
    step.heads.zero_()
    some = run()
    assert torch.equal(whole[~idle], some[~idle])
    assert (step.routing.experts[idle] == -1).all() and (step.routing.weights[idle] == 0).all()
    assert not list_is_wrong(step)
    of_idle = step.pages[idle].flatten().long()
    assert all(torch.equal(a[of_idle], b[of_idle]) for a, b in zip(layer.cache, cache, strict=True))


def test_all_rows_idle(emulator: Emulator) -> None:
    """No expert has a token: the streams have nothing to do, and all kernels end."""
    layer, step = layer_and_step(SMALL, 4)
    step.places[:, 0] = -1
    step.heads.zero_()
    step.run_first_norm(layer)
    before = step.residual.clone()
    step.run(layer)
    assert step.routing.counts.tolist() == [0, 0]
    assert torch.equal(step.residual, before)


def test_the_first_kernels_of_a_step(emulator: Emulator) -> None:
    """The embedding says where rows stand, and the attention two kernels later reads it."""
    for rows in (1, 3):
        layer, step = layer_and_step(SMALL, rows)
        emulator.forget()
        wants, places = step.places.clone(), step.places
        table = torch.randn(50, SMALL.hidden).bfloat16()
        slots = torch.arange(rows, dtype=torch.int32)
        if rows > 1:
            slots[1], wants[1] = -1, torch.tensor([-1, 0, 0, 0])
        tokens = torch.tensor([7, 49, 0][:rows], dtype=torch.int32)
        step.kernels.embed(table, slots, (tokens, step.lengths, places[:, 2] - step.lengths), step.residual, places)
        there = slots >= 0
        assert torch.equal(places, wants)
        assert torch.equal(step.residual[there], table[tokens.long()][there])
        step.run_first_norm(layer)
        step.run_qkv(layer)
        step.run_attention(layer)
        assert torch.isfinite(step.heads[there]).all()


def test_heads_of_a_prompt_are_placed(emulator: Emulator) -> None:
    """Many tokens at once leave in the cache what one at a time leaves."""
    torch.manual_seed(1)
    count, shape = PAGE + 3, ODD
    qkv = torch.randn(count, shape.qkv).bfloat16()
    norms = tuple((1 + 0.1 * torch.randn(shape.head_dim)).bfloat16() for _ in range(2))
    angles = torch.rand(count, shape.head_dim // 2)
    rotary = (angles.cos().bfloat16(), angles.sin().bfloat16())
    table = torch.tensor([2, 0], dtype=torch.int32)
    cache = tuple(torch.zeros(3, shape.kv_heads, PAGE, shape.head_dim).bfloat16() for _ in range(2))
    given = qkv.clone()
    PromptKernels(shape, CPU).place_heads(qkv, norms, EPS, rotary, table, cache)
    empty = tuple(torch.zeros_like(one) for one in cache)
    for token in (0, 5, PAGE - 1, PAGE, count - 1):
        at = tuple(one[token : token + 1] for one in rotary)
        _, key, value = reference.attention(given[token], norms, EPS, at, 0, 0, table, empty, shape)
        page, place = int(table[token // PAGE]), token % PAGE
        assert torch.equal(cache[0][page, :, place], key.bfloat16())
        assert torch.equal(cache[1][page, :, place], value.bfloat16())


VOCABULARY = 1000


def slots_of(count: int, **settings: float) -> SimpleNamespace:
    """State of slots as `SamplingKernels` reads it, all with the same settings."""
    numbers = {name: torch.zeros(count, dtype=torch.int32) for name in ("tokens", "lengths", "made")}
    return SimpleNamespace(
        **numbers,
        temperatures=torch.full((count,), settings.get("temperature", 1.0)),
        top_ks=torch.full((count,), int(settings.get("top_k", 0)), dtype=torch.int32),
        top_ps=torch.full((count,), settings.get("top_p", 1.0)),
        seeds=torch.arange(count),
        seen=torch.zeros(count, VOCABULARY, dtype=torch.uint8),
    )


def test_the_greatest_logit_is_taken(emulator: Emulator) -> None:
    kernels = SamplingKernels(VOCABULARY, CPU)
    torch.manual_seed(0)
    logits = torch.randn(5, VOCABULARY).bfloat16()
    logits[0, 7], logits[0, 900] = 9.0, 9.0  # of equal ones the first
    logits[1] = -logits[1].abs()
    logits[3, 500] = float("nan")
    rows, recent = torch.tensor([2, 0, -1, 1, 4], dtype=torch.int32), torch.full((5,), -5, dtype=torch.int32)
    state = slots_of(5)
    kernels.next_tokens(logits, rows, state, recent, "greatest", False)
    most = logits.float().argmax(-1).tolist()
    assert recent.tolist() == [7, most[1], -5, -1, most[4]]
    assert state.tokens[[2, 0, 4]].tolist() == [7, most[1], most[4]]
    assert state.made.tolist() == state.lengths.tolist() == [1, 1, 1, 0, 1]
    assert state.seen.sum() == 4 and state.seen[2, 7] == 1


@pytest.mark.parametrize("draw", ["top", "all"])
def test_tokens_are_drawn(emulator: Emulator, draw: str) -> None:
    """From the allowed ones alone, about as often as they should, and whatever row a slot has."""
    kernels = SamplingKernels(VOCABULARY, CPU)
    count = 60
    logits = torch.full((count, VOCABULARY), -20.0).bfloat16()
    logits[:, 30], logits[:, 20], logits[:, 10] = 3.0, 3.0 - 0.6875, -1.0  # two of three, one of three, and little
    rows, recent = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    for settings, allowed in (({"temperature": 0.0}, {30}), ({"top_k": 1}, {30}), ({"top_p": 0.9}, {20, 30})):
        kernels.next_tokens(logits, rows, slots_of(count, **settings), recent, draw, False)
        assert set(recent.tolist()) == allowed
    assert 25 <= recent.tolist().count(30) <= 52
    turned = torch.zeros_like(recent)
    emulator.seed += 1
    kernels.next_tokens(logits, rows.flip(0), slots_of(count, top_p=0.9), turned, draw, False)
    assert torch.equal(turned.flip(0), recent)


MISTAKES = {
    "a barrier left out": ("linear.cu", "        }\n    __syncthreads();", "        }", "which nobody wrote|race"),
    "a barrier of some": ("linear.cu", "    __syncthreads();", "    if (warp) __syncthreads();", "race|nobody wrote"),
    "a barrier that one warp never reaches": (
        "router.cu", "    if (tile < NT) {\n        float", "    if (warp == 1) emulated_barrier(1, 512);\n    if (tile < NT) {\n        float",
        "deadlock, of 512 threads 480 wait at barrier 0, 32 wait at barrier 1",
    ),
    "copies not waited for": ("experts.cu", "wait_for_copies<stages - 2>();", "", "a copy to it is under way"),
    "a team without its barrier": ("experts.cu", "team_barrier<slices * WARP>(team);", "", "race|nobody wrote|copy to it is under way"),
    "a buffer's end": ("norm.cu", "(token * TOPK + s) * HIDDEN", "(token * TOPK + s + 1) * HIDDEN", "outside of all buffers"),
    "an odd address": ("norm.cu", "load(weight + group * 8)", "load(weight + group * 8 + 4)", "not a multiple|outside"),
    "a read before the wait": (
        "router.cu", "    wait_for_previous();", "    if (tile < NT) r0.group[0] = load(x);\n    wait_for_previous();",
        "reads x .* which the kernel ahead writes, before waiting",
    ),
    "a start too early": ("linear.cu", "wait_for_previous();\n    let_next_start();", "let_next_start();\n    wait_for_previous();", "before waiting"),
    "a count without its fence": ("router.cu", "#if !SINGLE\n    __threadfence();", "#if !SINGLE", "behind no fence"),
    "a warp that does not meet": ("attention.cu", "s = warp_sum(s);", "if (lane) s = warp_sum(s);", "deadlock|other lanes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(emulator: Emulator, name: str) -> None:
    source, old, new, words = MISTAKES[name]

    def edit(of: str, text: str) -> str:
        if of != source:
            return text
        assert old in text
        return text.replace(old, new)

    emulator.edit = edit
    with pytest.raises(EmulationError, match=words):
        layer, step = layer_and_step(SMALL, 3)
        check_layer(step, layer)


def test_ptx_without_a_twin_is_refused() -> None:
    with pytest.raises(EmulationError, match="tanh holds PTX and has no twin"):
        without_ptx('DEVICE float tanh(float x) {\n    asm("tanh.approx.f32 %0, %0;" : "+f"(x));\n    return x;\n}\n')
    with pytest.raises(EmulationError, match="PTX outside"):
        without_ptx('__global__ void f() { asm volatile("exit;"); }')


def test_arguments_must_be_the_kernels(emulator: Emulator) -> None:
    kernel = emulator.load_kernels(
        {"norm": wanted("norm.cu", "rms_norm", 256, TOPK=0, HIDDEN=256, THREADS=256)}, CPU, dependent=False
    )["norm"]
    x = torch.zeros(1, 256).bfloat16()
    with pytest.raises(EmulationError, match="7 arguments for 8"):
        kernel.launch((1,), x, None, None, None, x, EPS, x)
    with pytest.raises(EmulationError, match="eps is float, given 1"):
        kernel.launch((1,), x, None, None, None, x, 1, x, None)
