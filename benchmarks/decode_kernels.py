"""The kernels of a decode step: right first, then each alone and all together, over 48 layers of distinct weights.

    python benchmarks/decode_kernels.py [--layers 48] [--rows 1,8,32] [--sweep]

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

from omnifp4.kernels.cuda.decoder_plan import Tuning
from omnifp4.kernels.cuda.shapes import DecoderShape
from omnifp4.kernels.decode_check import LayerStep, LayerWeights, check_layer, pages_per_slot, wrong_parts

SHAPE = DecoderShape(hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8, inner=768)
DEVICE = torch.device("cuda")


def graph_ms(run: Callable[[], Any], repeats: int = 20) -> tuple[float, float, float]:
    """Median, least and most of graph replays, ms."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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
    pages = max(rows_list) * pages_per_slot(chosen.context)
    layers = [LayerWeights(SHAPE, pages, DEVICE) for _ in range(chosen.layers)]
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; weights {torch.cuda.memory_allocated() / 1e9:.1f} GB",
        flush=True,
    )
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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
        errors = check_layer(LayerStep(SHAPE, rows, DEVICE, context=chosen.context), layers[0])
        bad = wrong_parts(errors)
        wrong = wrong or bool(bad)
        print(
            f"rows {rows}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
            "WRONG " + str(bad) if bad else "right",
            flush=True,
        )
    if wrong:
        print("no speed is shown of wrong kernels")
        return 1
    if chosen.once:
        step = LayerStep(SHAPE, rows_list[0], DEVICE, context=chosen.context)
        step.run_first_norm(layers[0])
        for layer in layers:
            step.run(layer)
        torch.cuda.synchronize()
        return 0
    variants = {"default": Tuning()}
    if chosen.sweep:
        variants["not dependent"] = Tuning(dependent=False)
        # Stages under way, teams of a block, blocks of a multiprocessor, tiles at a time.
        for stages, teams, blocks, tiles in ((4, 1, 2, 2), (3, 1, 2, 1), (3, 1, 2, 4)):
            variants[f"gate_up {stages} x {teams} x {blocks}, {tiles}"] = Tuning(
                gate_up_stages=stages, gate_up_teams=teams, gate_up_blocks=blocks, gate_up_run=tiles
            )
        for stages, teams, blocks, tiles in ((3, 2, 2, 2), (4, 1, 4, 2), (3, 1, 4, 1)):
            variants[f"down {stages} x {teams} x {blocks}, {tiles}"] = Tuning(
                down_stages=stages, down_teams=teams, down_blocks=blocks, down_run=tiles
            )
        variants["attention 256"] = Tuning(attention_blocks=256)
    for rows in rows_list:
        for name, tuning in variants.items():
            torch.manual_seed(rows)  # every variant routes alike
            step = LayerStep(SHAPE, rows, DEVICE, tuning=tuning, context=chosen.context)
            # The checks take ragged contexts; what is timed has the whole context in every row.
            step.places[:, 1:3] = chosen.context
            parts: dict[str, Callable[[LayerWeights], None]] = {
                "qkv": step.run_qkv, "attention": step.run_attention, "o": step.run_o, "norm": step.run_norm,
                "router": step.run_router, "gate_up": step.run_gate_up, "down": step.run_down, "add": step.run_add,
            }  # fmt: skip
            if rows == 1:
                del parts["norm"], parts["add"]
            if name != "default":
                subject = name.split()[0]
                parts = {part: run for part, run in parts.items() if part == subject}
            start = torch.randn_like(step.residual)

            def run_all(step: LayerStep = step, start: Tensor = start) -> None:
                step.residual.copy_(start)
                step.run_first_norm(layers[0])
                for layer in layers:
                    step.run(layer)

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
