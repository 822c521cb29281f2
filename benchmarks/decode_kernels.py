"""The kernels of a decode step: right first, then each alone and all together, over 48 layers of distinct weights.

    python benchmarks/decode_kernels.py [--layers 48] [--rows 1,8,32] [--sweep] [--log FILE]

Random weights of Qwen3-Omni-30B-A3B's thinker, real routing. Times are of CUDA-graph replays, median of 20.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omnifp4.kernels import decode_reference as reference
from omnifp4.kernels.cuda.decoder import CODE_FACTOR, DecoderKernels, Matrix, Tuning
from omnifp4.kernels.cuda.shapes import PAGE, DecoderShape

SHAPE = DecoderShape(hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8, inner=768)
DEVICE = torch.device("cuda")
EPS = 1e-6


def random_matrix(*shape: int) -> Matrix:
    """Codes uniform, scales around 1, weights with a spread of about 0.02."""
    *lead, rows, columns = shape
    codes = torch.randint(0, 256, (*lead, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(0x30, 0x40, (*lead, rows, columns // 16), dtype=torch.uint8, device=DEVICE)
    count = lead[0] if lead else rows // 16
    factors = torch.full((count,), CODE_FACTOR / 160, device=DEVICE) * (0.5 + torch.rand(count, device=DEVICE))
    return Matrix(codes, scales, factors)


class Layer:
    def __init__(self, shape: DecoderShape, pages: int) -> None:
        self.qkv = random_matrix(shape.qkv, shape.hidden)
        self.o = random_matrix(shape.hidden, shape.heads * shape.head_dim)
        self.gate_up = random_matrix(shape.experts, 2 * shape.inner, shape.hidden)
        self.down = random_matrix(shape.experts, shape.hidden, shape.inner)
        self.router = (torch.randn(shape.experts, shape.hidden, device=DEVICE) * 0.02).bfloat16()
        self.norms = [
            (1 + 0.1 * torch.randn(n, device=DEVICE)).bfloat16()
            for n in (shape.hidden, shape.hidden, shape.head_dim, shape.head_dim)
        ]
        self.cache = tuple(
            torch.randn(pages, shape.kv_heads, PAGE, shape.head_dim, device=DEVICE).bfloat16() for _ in range(2)
        )


class Step:
    """Buffers of a step and its kernels."""

    def __init__(self, shape: DecoderShape, rows: int, tuning: Tuning, context: int, pages_per_slot: int) -> None:
        self.shape, self.rows = shape, rows
        self.kernels = DecoderKernels(shape, rows, DEVICE, {"qkv": True, "o": True, "experts": True}, tuning)
        new = lambda *size: torch.full(size, float("nan"), dtype=torch.bfloat16, device=DEVICE)  # noqa: E731
        self.residual = torch.randn(rows, shape.hidden, device=DEVICE).bfloat16()
        self.normed, self.natural = new(rows, shape.hidden), new(rows, shape.hidden)
        self.qkv, self.heads = new(rows, shape.qkv), new(rows, shape.heads * shape.head_dim)
        self.inner, self.outer = new(rows * shape.top_k, shape.inner), new(rows * shape.top_k, shape.hidden)
        self.routing = self.kernels.routing_buffers()
        self.splits = self.kernels.split_buffers()
        # Ragged where there are several rows, and with a rotary shift.
        self.lengths = torch.tensor([max(0, context - 37 * r) for r in range(rows)], dtype=torch.int32, device=DEVICE)
        slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        shifts = (self.lengths > 0).int() * 3
        self.places = torch.stack([slots, self.lengths, self.lengths + shifts, slots * 0], dim=1).contiguous()
        self.pages = torch.randperm(rows * pages_per_slot, device=DEVICE).int().view(rows, pages_per_slot)
        angles = torch.arange(pages_per_slot * PAGE + 8, device=DEVICE)[:, None] * 1e6 ** (
            -torch.arange(shape.head_dim // 2, device=DEVICE) / (shape.head_dim // 2)
        )
        self.rotary = (angles.cos().bfloat16(), angles.sin().bfloat16())

    def run_qkv(self, layer: Layer) -> None:
        if self.rows == 1:
            self.kernels.qkv(layer.qkv, self.residual, layer.norms[0], EPS, self.qkv)
        else:
            self.kernels.qkv(layer.qkv, self.normed, None, EPS, self.qkv)

    def run_attention(self, layer: Layer) -> None:
        self.kernels.attention(
            self.qkv, (layer.norms[2], layer.norms[3]), EPS, self.rotary, self.places,
            self.pages, layer.cache, self.splits, self.heads,
        )  # fmt: skip

    def run_o(self, layer: Layer) -> None:
        self.kernels.o(layer.o, self.heads, self.residual)

    def run_norm(self, layer: Layer) -> None:
        self.kernels.norm(self.residual, layer.norms[1], EPS, natural=self.natural, fp4_order=self.normed)

    def run_router(self, layer: Layer) -> None:
        if self.rows == 1:
            self.kernels.router(
                layer.router, self.residual, layer.norms[1], EPS, self.normed, self.places, self.routing
            )
        else:
            self.kernels.router(layer.router, self.natural, None, EPS, None, self.places, self.routing)

    def run_gate_up(self, layer: Layer) -> None:
        self.kernels.gate_up(layer.gate_up, self.normed, self.routing, self.inner)

    def run_down(self, layer: Layer) -> None:
        out = self.residual if self.rows == 1 else self.outer
        self.kernels.down(layer.down, self.inner, self.routing, out)

    def run_add(self, layer: Layer) -> None:
        if self.rows > 1:
            self.kernels.norm(self.residual, layer.norms[0], EPS, fp4_order=self.normed, add=(self.outer, self.routing))

    def run_layer(self, layer: Layer) -> None:
        self.run_qkv(layer)
        self.run_attention(layer)
        self.run_o(layer)
        if self.rows > 1:
            self.run_norm(layer)
        self.run_router(layer)
        self.run_gate_up(layer)
        self.run_down(layer)
        self.run_add(layer)


def apart(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    error = ((got - want).norm() / want.norm()).item()
    return error if error == error else float("inf")


def check(step: Step, layer: Layer) -> dict[str, float]:
    """Relative error of every kernel on the inputs that it had."""
    shape, rows, errors = step.shape, step.rows, {}
    step.residual.normal_()
    before = step.residual.float()
    if rows > 1:
        step.kernels.norm(step.residual, layer.norms[0], EPS, fp4_order=step.normed)
        errors["norm"] = apart(
            reference.in_natural_order(step.normed).float(), reference.norm(before, layer.norms[0], EPS)
        )
    step.run_qkv(layer)
    x = reference.norm(before, layer.norms[0], EPS)
    errors["qkv"] = apart(step.qkv, x @ reference.weights_of(layer.qkv).T)
    held = [c.clone() for c in layer.cache]
    step.run_attention(layer)
    wanted = [
        reference.attention(
            step.qkv[r], (layer.norms[2], layer.norms[3]), EPS, step.rotary, int(step.lengths[r]), int(step.places[r, 2] - step.lengths[r]),
            step.pages[r], (held[0], held[1]), shape,
        )
        for r in range(rows)
    ]  # fmt: skip
    errors["attention"] = apart(reference.in_natural_order(step.heads), torch.stack([one[0] for one in wanted]))
    for r in range(rows):
        length = int(step.lengths[r])
        page, place = int(step.pages[r, length // PAGE]), length % PAGE
        errors["cache"] = max(
            errors.get("cache", 0.0),
            apart(layer.cache[0][page, :, place], wanted[r][1]),
            apart(layer.cache[1][page, :, place], wanted[r][2]),
        )
    step.run_o(layer)
    o = reference.rounded(reference.in_natural_order(step.heads).float() @ reference.weights_of(layer.o).T)
    errors["o"] = apart(step.residual, before + o)
    after = step.residual.float()
    x = reference.norm(after, layer.norms[1], EPS)
    if rows > 1:
        step.run_norm(layer)
    step.run_router(layer)
    errors["second norm"] = apart(reference.in_natural_order(step.normed), x)
    logits = step.routing.logits.sum(0)
    errors["router logits"] = apart(logits, x @ layer.router.float().T)
    routed = reference.route(reference.rounded(logits), shape.top_k, True)
    places = torch.arange(shape.top_k)
    if rows > 1:
        places = step.routing.places.long()
        errors["router choice"] = float((routed.experts != step.routing.experts).sum())
        errors["router weights"] = apart(step.routing.weights, routed.weights)
        entries, distinct = step.routing.counts.tolist()
        active = step.routing.active[:entries].tolist()
        listed = {(e, s) for e, first, count, _ in active for s in step.routing.slots[first : first + count].tolist()}
        flat = step.routing.experts.flatten().tolist()
        wrong = listed != {(e, slot) for slot, e in enumerate(flat)}
        wrong = wrong or sum(row[2] for row in active) != len(flat) or any(not 1 <= row[2] <= 8 for row in active)
        wrong = wrong or [row[0] for row in active] != sorted(e for e in set(flat) for _ in range(0, flat.count(e), 8))
        errors["router list"] = float(wrong or distinct != len(set(flat)))
    step.run_gate_up(layer)
    inner = reference.gate_up(x, routed.experts, layer.gate_up, shape.inner)
    by_slot = reference.in_natural_order(step.inner)[places].view(rows, shape.top_k, shape.inner)
    errors["gate_up"] = apart(by_slot, inner)
    outer = reference.down(by_slot.float(), routed.experts, layer.down, shape.hidden)
    summed = after + reference.rounded((outer * routed.weights[..., None]).sum(1))
    step.run_down(layer)
    if rows > 1:
        errors["down"] = apart(step.outer.view(rows, shape.top_k, -1), outer)
        step.run_add(layer)
        errors["add_norm"] = apart(
            reference.in_natural_order(step.normed), reference.norm(step.residual.float(), layer.norms[0], EPS)
        )
    errors["layer"] = apart(step.residual, summed)
    return errors


BOUNDS = {"router choice": 0.5, "router list": 0.5}


def graph_ms(run: Callable[[], Any], repeats: int = 20) -> tuple[float, float, float]:
    """Median, least and most of graph replays, ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times), min(times), max(times)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--once", action="store_true", help="one step without a graph, for a profiler")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(1)
    rows_list = [int(one) for one in chosen.rows.split(",")]
    pages_per_slot = chosen.context // PAGE + 2
    layers = [Layer(SHAPE, max(rows_list) * pages_per_slot) for _ in range(chosen.layers)]
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; weights {torch.cuda.memory_allocated() / 1e9:.1f} GB",
        flush=True,
    )
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        target.copy_(source)
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    copy = 2 * source.numel() / statistics.median(times) / 1e9
    print(f"copy {copy:.2f} TB/s", flush=True)
    wrong = False
    for rows in sorted({1, 2, 5, 8, 13, *rows_list}):
        if rows > max(rows_list):
            continue
        step = Step(SHAPE, rows, Tuning(), chosen.context, pages_per_slot)
        errors = check(step, layers[0])
        bad = {name: error for name, error in errors.items() if not error <= BOUNDS.get(name, 5e-3)}
        wrong = wrong or bool(bad)
        print(
            f"rows {rows}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
            "WRONG " + str(list(bad)) if bad else "right",
            flush=True,
        )
    if wrong:
        print("no speed is shown of wrong kernels")
        return 1
    if chosen.once:
        step = Step(SHAPE, rows_list[0], Tuning(), chosen.context, pages_per_slot)
        step.residual.normal_()
        step.kernels.norm(step.residual, layers[0].norms[0], EPS, fp4_order=step.normed)
        for layer in layers:
            step.run_layer(layer)
        torch.cuda.synchronize()
        return 0
    variants = {"default": Tuning()}
    if chosen.sweep:
        variants["not dependent"] = Tuning(dependent=False)
        # Chunks under way, warps of a block, blocks of a multiprocessor, activations a chunk ahead.
        for ring, warps, blocks, ahead in ((4, 8, 2, False), (2, 8, 3, False), (8, 8, 1, True), (8, 12, 1, False)):
            variants[f"gate_up {ring} x {warps} x {blocks} {ahead}"] = Tuning(
                gate_up_ring=ring, gate_up_warps=warps, gate_up_blocks=blocks, gate_up_ahead=ahead
            )
        for ring, warps, blocks, ahead in ((3, 10, 2, False), (3, 8, 2, False), (2, 8, 3, False), (6, 12, 1, True)):
            variants[f"down {ring} x {warps} x {blocks} {ahead}"] = Tuning(
                down_ring=ring, down_warps=warps, down_blocks=blocks, down_ahead=ahead
            )
        for blocks, stretch in ((64, 256), (128, 128), (256, 256)):
            variants[f"attention {blocks} {stretch}"] = Tuning(attention_blocks=blocks, min_stretch=stretch)
    for rows in rows_list:
        for name, tuning in variants.items():
            step = Step(SHAPE, rows, tuning, chosen.context, pages_per_slot)
            parts: dict[str, Callable[[Layer], None]] = {
                "qkv": step.run_qkv, "attention": step.run_attention, "o": step.run_o, "norm": step.run_norm,
                "router": step.run_router, "gate_up": step.run_gate_up, "down": step.run_down, "add": step.run_add,
            }  # fmt: skip
            if rows == 1:
                del parts["norm"], parts["add"]
            if name != "default":
                subject = name.split()[0]
                parts = {part: run for part, run in parts.items() if part == subject}
            start = torch.randn_like(step.residual)

            def run_all(step: Step = step, start: Tensor = start) -> None:
                step.residual.copy_(start)
                if step.rows > 1:
                    step.kernels.norm(step.residual, layers[0].norms[0], EPS, fp4_order=step.normed)
                for layer in layers:
                    step.run_layer(layer)

            whole = graph_ms(run_all)
            each = {}
            for part, run in parts.items():
                each[part] = graph_ms(lambda: [run(layer) for layer in layers])[0] * 1000 / len(layers)  # noqa: B023
            distinct = int(step.routing.counts[1]) if rows > 1 else SHAPE.top_k
            moved = (
                SHAPE.qkv + SHAPE.heads * SHAPE.head_dim
            ) * SHAPE.hidden * 0.5625 + distinct * 3 * SHAPE.hidden * SHAPE.inner * 0.5625
            reached = moved * len(layers) / whole[0] / 1e9
            print(
                f"rows {rows:2d} {name:24s}: {whole[0]:.3f} ms ({whole[1]:.3f}-{whole[2]:.3f}) = {rows * 1000 / whole[0]:.0f} tok/s without head; "
                f"{distinct} experts in the last layer, {reached:.2f} TB/s; us a layer: "
                + ", ".join(f"{part} {us:.1f}" for part, us in each.items()),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
