"""Experts of one layer for many tokens, on one CUDA GPU: ``python benchmarks/kernel_prefill.py [--quick]``.

The shape is Qwen3-Omni's thinker: 128 experts of width 768 over 2048, eight a token, routed at random. First every route
is held to the reference in float64; no speed is printed if one fails. Then medians of CUDA graph replays. Bytes are the packed
weights of the experts in use and each activation once; both limits are of the datasheet-like ceilings given as options.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton

from omnifp4.kernels.prefill import reference
from omnifp4.kernels.prefill.experts import experts, experts_unpacked_first, mix, tiles_for
from omnifp4.kernels.prefill.matrices import PackedMatrices
from omnifp4.kernels.prefill.products import Tile, down, gate_up, linear, split_columns
from omnifp4.kernels.prefill.routing import route
from omnifp4.kernels.prefill.unpacking import dequantize
from omnifp4.runtime.backends.torch_ops import TorchBackend
from omnifp4.runtime.packed import PackedWeight

EXPERTS, HIDDEN, INNER, PLACES = 128, 2048, 768, 8
NARROW = (
    Tile(128, 16, 128, 4, 4),
    Tile(64, 16, 256, 4, 4),
    Tile(128, 16, 256, 4, 3),
    Tile(128, 32, 128, 4, 4),
    Tile(64, 32, 256, 4, 3),
)
MIDDLE = (Tile(128, 64, 128, 4, 3), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 4))
BROAD = (
    Tile(128, 128, 128, 8, 3),
    Tile(128, 128, 128, 4, 3),
    Tile(64, 128, 128, 4, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(64, 256, 64, 4, 3),
)


def random_matrices(count: int, rows: int, columns: int, reciprocal: bool = False) -> PackedMatrices:
    """Random codes under scales near one; values near 0.02."""
    packed = torch.randint(0, 256, (count, rows, columns // 2), dtype=torch.uint8, device="cuda")
    block_scale = torch.randint(0x28, 0x40, (count, rows, columns // 16), dtype=torch.uint8, device="cuda")
    scale = torch.rand(count, device="cuda") * 0.01 + 0.01
    return PackedMatrices(packed, block_scale, scale.reciprocal() if reciprocal else scale, reciprocal)


def random_slots(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, distinct experts and weights that sum to one."""
    hidden = torch.randn(tokens, HIDDEN, device="cuda").to(dtype)
    weights, index = torch.rand(tokens, EXPERTS, device="cuda").topk(PLACES, dim=-1)
    return hidden, index, (weights / weights.sum(-1, keepdim=True)).to(dtype)


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def replay_us(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median microseconds of a replay of `run` in a CUDA graph."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(repeats + 2):
        begin, end = event(), event()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1000)
    return sorted(times[2:])[repeats // 2]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(both: tuple[PackedMatrices, PackedMatrices]) -> list[str]:
    """What is wrong; empty if nothing is."""
    wrong = []
    for weight in both:
        made = dequantize(weight.packed, weight.block_scale, weight.tensor_scale, weight.reciprocal, torch.bfloat16)
        for expert in (0, EXPERTS - 1):
            one = PackedWeight(
                weight.packed[expert], weight.block_scale[expert], weight.tensor_scale[expert], weight.reciprocal
            )
            if not torch.equal(made[expert], TorchBackend().dequantize(one, torch.bfloat16)):
                wrong.append(f"dequantize {weight.shape} differs from TorchBackend")
    hidden, index, weights = random_slots(200)
    index[::7, 3] = EXPERTS
    weights[::5, 2] = 0
    expected = reference.experts(hidden, index, weights, *both, dtype=torch.float32)
    for tile in (*NARROW, *MIDDLE, *BROAD):
        try:
            found = experts(hidden, index, weights, *both, (tile, tile))
        except triton.runtime.errors.OutOfResources:
            continue
        away = relative(found, expected)
        if not away < 0.006:
            wrong.append(f"experts {tile}: relative error {away}")
        if not torch.equal(found, experts(hidden, index, weights, *both, (tile, tile))):
            wrong.append(f"experts {tile}: two runs differ")
    away = relative(experts_unpacked_first(hidden, index, weights, *both), expected)
    if not away < 0.008:
        wrong.append(f"experts unpacked first: relative error {away}")
    dense = random_matrices(1, 5120, HIDDEN, reciprocal=True)
    away = relative(linear(hidden, dense, Tile()), reference.linear(hidden, dense))
    if not away < 0.005:
        wrong.append(f"linear: relative error {away}")
    return wrong


def compile_all(both: tuple[PackedMatrices, PackedMatrices]) -> None:
    """Every variant once, several at a time: most of a compilation runs outside of Python."""
    hidden, index, weights = random_slots(8)

    def once(tile: Tile) -> None:
        try:
            experts(hidden, index, weights, *both, (tile, tile))
        except triton.runtime.errors.OutOfResources as error:
            print(f"  {tile}: {error}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(once, (*NARROW, *MIDDLE, *BROAD)))
    torch.cuda.synchronize()


def sweep(
    tokens: int, both: tuple[PackedMatrices, PackedMatrices], ceilings: tuple[float, float], quick: bool
) -> dict[str, Any]:
    """Times of every variant for so many tokens, printed as a table."""
    hidden, index, weights = random_slots(tokens)
    slots = tokens * PLACES
    used = int(torch.bincount(index.reshape(-1), minlength=EXPERTS).count_nonzero())
    flops = 2.0 * slots * 3 * INNER * HIDDEN
    moved = used * 3 * INNER * HIDDEN * 0.5625 + slots * INNER * 4 + slots * HIDDEN * 4 + tokens * HIDDEN * 6
    bytes_us, flops_us = moved / ceilings[0] / 1e6, flops / ceilings[1] / 1e6
    print(
        f"\n{tokens} tokens, {slots / EXPERTS:.0f} rows an expert: limits {bytes_us:.0f} us bytes, {flops_us:.0f} us flops"
    )
    candidates = (
        NARROW + MIDDLE if tokens <= 128 else NARROW[3:] + MIDDLE + BROAD[2:3] if tokens <= 512 else BROAD + MIDDLE
    )
    rows: dict[str, Any] = {}
    x = split_columns(hidden)
    for tile in candidates[:3] if quick else candidates:
        routing = route(index, EXPERTS, tile.tokens)
        try:
            inner = gate_up(x, both[0], routing, tile)
            first = replay_us(partial(gate_up, x, both[0], routing, tile))
            second = replay_us(partial(down, inner, both[1], routing, tile))
        except triton.runtime.errors.OutOfResources:
            continue
        rows[str(tile)] = [first, second]
        print(
            f"  {tile!s:20s} gate_up {first:7.1f} us {flops / 1.5 / first / 1e6:5.0f} TFLOP/s"
            f"   down {second:7.1f} us {flops / 3 / second / 1e6:5.0f} TFLOP/s   both {first + second:7.1f}"
        )
    tile = tiles_for(slots, EXPERTS)[0]
    routing = route(index, EXPERTS, tile.tokens)
    by_slot = torch.randn(slots, HIDDEN, device="cuda").bfloat16()
    parts = {
        "split": replay_us(partial(split_columns, hidden)),
        "route": replay_us(partial(route, index, EXPERTS, tile.tokens)),
        "mix": replay_us(partial(mix, by_slot, index, weights, EXPERTS, torch.empty_like(hidden))),
        "experts, all of it": replay_us(partial(experts, hidden, index, weights, *both)),
    }
    try:
        parts["unpacked first, all of it"] = replay_us(partial(experts_unpacked_first, hidden, index, weights, *both))
    except (RuntimeError, torch.AcceleratorError) as error:
        print(f"  unpacked first: {str(error).splitlines()[0]}")
    for name, us in parts.items():
        print(f"  {name:28s} {us:8.1f} us")
    return {"tokens": tokens, "bytes_us": bytes_us, "flops_us": flops_us, "tiles": rows, **parts}


def dense(tokens: int, rows: int, columns: int) -> dict[str, Any]:
    """A linear layer unpacked in the main loop, against unpacked first and multiplied by cuBLAS."""
    weight = random_matrices(1, rows, columns)
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    fused = {}
    for tile in (BROAD[0], BROAD[2], MIDDLE[0]):
        fused[str(tile)] = replay_us(partial(linear, x, weight, tile))
    one = (weight.packed, weight.block_scale, weight.tensor_scale, False, torch.bfloat16)
    first = replay_us(lambda: torch.mm(x, dequantize(*one)[0].T))
    wide = dequantize(*one)[0]
    bare = replay_us(lambda: torch.mm(x, wide.T))
    told = "  ".join(f"{name} {us:.1f}" for name, us in fused.items())
    print(f"  {tokens:5d} x {columns} -> {rows}: unpacked first {first:.1f} us, cuBLAS alone {bare:.1f}; fused {told}")
    return {"tokens": tokens, "rows": rows, "columns": columns, "first": first, "cublas": bare, **fused}


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill kernels on packed experts.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 2048, 8192])
    parser.add_argument("--quick", action="store_true", help="three variants a shape")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="copy bandwidth, TB/s")
    parser.add_argument("--rate", type=float, default=790, help="dense BF16, TFLOP/s")
    options = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(time.time_ns() % 2**31)
    both = random_matrices(EXPERTS, 2 * INNER, HIDDEN), random_matrices(EXPERTS, HIDDEN, INNER)
    compile_all(both)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; compiled in {time.perf_counter() - began:.0f} s"
    )
    # Fresh memory is NaN, so that rows that nobody wrote show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = check(both)
    torch.use_deterministic_algorithms(False)
    if wrong:
        raise SystemExit("not measured:\n  " + "\n  ".join(wrong))
    print(f"all variants agree with the reference, {time.perf_counter() - began:.0f} s")
    result: dict[str, Any] = {"benchmark": "kernel_prefill", "gpu": torch.cuda.get_device_name()}
    one = both[0]
    us = replay_us(partial(dequantize, one.packed, one.block_scale, one.tensor_scale, False, torch.bfloat16))
    rate = one.packed.numel() * (1 + 0.125 + 4) / us / 1e6
    print(f"dequantize {one.shape}: {us:.0f} us, {rate:.2f} TB/s read and written")
    result |= {"dequantize_us": us, "dequantize_tb_per_s": rate}
    ceilings = (options.bandwidth, options.rate)
    result["shapes"] = [sweep(tokens, both, ceilings, options.quick) for tokens in options.tokens]
    print("\ndense")
    shapes = ((5120, 2048), (2048, 4096))
    result["dense"] = [dense(tokens, *shape) for tokens in options.tokens for shape in shapes]
    print(f"{time.perf_counter() - began:.0f} s in all")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
