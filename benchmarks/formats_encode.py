"""Speed of NVFP4 encoding on this machine: ``python benchmarks/formats_encode.py [--rows 2048] [--columns 4096]``.

Prints a card, then one line of JSON. Speeds are millions of weights a second, read as BF16; each is the best of
several repeats, because other work on the machine only ever slows one down. The naive loop is the sweep as one would
first write it for numba: for every value under each of the eleven candidates a division and seven comparisons,
without branches, and with fast-math, which the real loops do without. It chooses scales and writes no codes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from omnifp4.formats import fast_cpu, reference
from omnifp4.formats.nvfp4 import E2M1_MAGNITUDES, E4M3_VALUES, ScaleRule

E2M1_STEPS = tuple(np.diff(E2M1_MAGNITUDES))
E2M1_MIDDLES = tuple(reference.E2M1_MIDPOINTS)


@numba.njit(nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator, unused-ignore]
def _naive_sweep(
    bits: npt.NDArray[np.uint16],
    tensor_scale: np.float32,
    table: npt.NDArray[np.float32],
    middles: Any,
    out: npt.NDArray[np.uint8],
) -> None:
    widened = np.empty(16, np.uint32)
    block = widened.view(np.float32)
    for b in range(bits.size // 16):
        largest = np.float32(0)
        for j in range(16):
            widened[j] = np.uint32(bits[16 * b + j]) << np.uint32(16)
            largest = max(largest, abs(block[j]))
        centre: Any = np.searchsorted(middles, largest / (np.float32(6) * tensor_scale))
        best = np.float32(np.inf)
        for offset in range(-3, 8):
            code = min(max(centre + offset, 1), 126)
            scale = table[code] * tensor_scale
            error = np.float32(0)
            for j in range(16):
                y = abs(block[j]) / scale
                nearest = np.float32(0)
                for k in range(7):
                    nearest += E2M1_STEPS[k] if y > E2M1_MIDDLES[k] else np.float32(0)
                difference = abs(block[j]) - nearest * scale
                error += difference * difference
            if error < best:
                best = error
                out[b] = code


def _speed(weights: int, run: Callable[[], Any], repeats: int) -> float:
    run()
    best = min(_seconds(run) for _ in range(repeats))
    return weights / best / 1e6


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(rows: int, columns: int, threads: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Speeds in millions of weights a second, keyed by what ran."""
    rng = np.random.default_rng(0)
    raw = fast_cpu.bf16_bits((rng.standard_normal((rows, columns)) * 0.02).astype(np.float32))
    wide = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    amax = fast_cpu.scan(raw, "BF16").amax
    speeds: dict[str, float] = {}
    weights = raw.size
    errors: dict[str, float] = {}
    for rule in ScaleRule:
        scale = reference.tensor_scale_for(amax, rule)
        for count in threads:
            outputs = [
                (np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // 16), np.uint8))
                for _ in range(count)
            ]
            with ThreadPoolExecutor(count) as pool:

                def encode_all(
                    rule: ScaleRule = rule,
                    scale: np.float32 = scale,
                    outputs: list[tuple[Any, Any]] = outputs,
                    pool: ThreadPoolExecutor = pool,
                ) -> list[fast_cpu.EncodeStats]:
                    jobs = [pool.submit(fast_cpu.encode_into, raw, "BF16", rule, scale, *out) for out in outputs]
                    return [job.result() for job in jobs]

                stats = encode_all()[0]
                errors[rule.value] = stats.squared_error / stats.energy
                speeds[f"{rule.value}, {count} thread{'s' * (count > 1)}"] = _speed(
                    weights * count, encode_all, repeats
                )
    part = wide[: max(1, rows // 16)]
    for rule in ScaleRule:
        speeds[f"{rule.value}, reference"] = _speed(part.size, partial(reference.encode, part, rule), 1)
    scale = reference.tensor_scale_for(amax, ScaleRule.SWEEP)
    codes = np.empty(weights // 16, np.uint8)
    speeds["sweep, naive numba loop"] = _speed(
        weights,
        lambda: _naive_sweep(raw.reshape(-1), scale, E4M3_VALUES, reference.E4M3_MIDPOINTS, codes),
        min(repeats, 3),
    )
    encoded, _ = fast_cpu.encode(raw, "BF16")
    assert (codes != encoded.block_scale.reshape(-1)).mean() < 1e-4, "the naive loop does other work"
    speeds["scan"] = _speed(weights, lambda: fast_cpu.scan(raw, "BF16"), repeats)
    speeds["compare"] = _speed(
        weights,
        lambda: fast_cpu.compare(raw, "BF16", encoded.packed, encoded.block_scale, encoded.tensor_scale),
        repeats,
    )
    effective = fast_cpu.effective_scale(encoded.block_scale, encoded.tensor_scale)
    decoded = np.empty(raw.shape, np.uint16)
    speeds["decode to BF16"] = _speed(
        weights, lambda: fast_cpu.decode_into(encoded.packed, effective, decoded), repeats
    )
    return {"million_weights_per_second": speeds, "relative_squared_error": errors}


def measure_cuda(experts: int, rows: int, columns: int) -> dict[str, Any]:
    """Gigabytes of BF16 read a second by whole calls on a GPU, medians; a copy counts bytes read and written."""
    import torch
    import triton

    from omnifp4.formats import fast_cuda

    torch.manual_seed(0)
    weight = (torch.randn(experts, rows, columns, device="cuda") * 0.02).bfloat16()
    size = weight.numel() * 2 / 1e9

    def rate(run: Callable[[], Any], gigabytes: float = size) -> float:
        milliseconds = float(triton.testing.do_bench(run, warmup=100, rep=500, return_mode="median"))
        return gigabytes / milliseconds * 1e3

    rates: dict[str, float] = {}
    for rule in ScaleRule:
        done = fast_cuda.encode_cuda(weight, rule)
        rates[rule.value] = rate(partial(fast_cuda.encode_cuda, weight, rule))
        scales = done.tensor_scale
        power_of_two = rule is ScaleRule.SWEEP
        kernel = partial(fast_cuda.launch_encode, weight, rule, scales, power_of_two=power_of_two)
        rates[f"{rule.value}, kernel"] = rate(kernel)
    decode = partial(fast_cuda.decode_cuda, done.packed, done.block_scale, done.tensor_scale, torch.bfloat16)
    rates["decode, BF16 written"] = rate(decode)
    target = torch.empty_like(weight)
    rates["copy"] = rate(lambda: target.copy_(weight), 2 * size)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu_shape": [experts, rows, columns],
        "bf16_gigabytes_per_second": {name: round(value, 1) for name, value in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of NVFP4 encoding on this machine.")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cuda", action="store_true", help="also measure a CUDA GPU, on 32 such weights at once")
    options = parser.parse_args()
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "shape": [options.rows, options.columns],
    }
    result = measure(options.rows, options.columns, tuple(options.threads), options.repeats)
    speeds = result["million_weights_per_second"]
    naive = speeds["sweep, naive numba loop"]
    print(f"NVFP4 encoding of a BF16 weight {options.rows} x {options.columns}")
    print(", ".join(f"{name} {value}" for name, value in machine.items() if name != "shape"))
    for name, speed in speeds.items():
        ratio = f"   {speed / naive:6.1f} x naive" if name.startswith("sweep") else ""
        print(f"  {name:32s} {speed:10.1f} M weights/s{ratio}")
    if options.cuda:
        gpu = measure_cuda(32, options.rows, options.columns)
        result |= gpu
        print(", ".join(f"{name} {value}" for name, value in gpu.items() if isinstance(value, str)))
        for name, speed in gpu["bf16_gigabytes_per_second"].items():
            print(f"  {name:32s} {speed:10.1f} GB/s of BF16")
    rounded = {name: round(speed, 1) for name, speed in speeds.items()}
    print(json.dumps({"benchmark": "formats_encode", **machine, **result, "million_weights_per_second": rounded}))


if __name__ == "__main__":
    main()
