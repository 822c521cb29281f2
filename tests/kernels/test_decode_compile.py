"""The decode kernels compile for every GPU they are meant for, on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

from omnifp4.kernels.cuda import compiler
from omnifp4.kernels.cuda.compiler import KernelCompileError, compile_source
from omnifp4.kernels.cuda.decoder_plan import DecoderPlan, Processor
from omnifp4.kernels.cuda.shapes import DecoderShape

REAL = DecoderShape(hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8, inner=768)
SMALL = DecoderShape(hidden=256, heads=4, kv_heads=2, head_dim=64, experts=8, top_k=2, inner=128)
PROCESSORS = {
    (8, 0): Processor(108, 166_912, 167_936),
    (8, 6): Processor(82, 101_376, 102_400),
    (8, 9): Processor(128, 101_376, 102_400),
    (9, 0): Processor(132, 232_448, 233_472),
    (10, 0): Processor(148, 232_448, 233_472),
    (11, 0): Processor(20, 232_448, 233_472),
    (12, 0): Processor(170, 101_376, 102_400),
}
"""Compute capability to multiprocessors and shared memory: A100, 3090, 4090, H200, B200, Jetson Thor, 5090."""


@pytest.fixture(autouse=True, scope="module")
def nvrtc() -> Iterator[None]:
    """An empty cache, so that sources are compiled; skips where the library itself is missing."""
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # what it raises is no class of the public interface
        pytest.skip(f"NVRTC is not installed: {str(error).splitlines()[0]}")
    yield


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))


def compiled(shape: DecoderShape, rows: int, capability: tuple[int, int], fp4: bool) -> dict[str, bytes]:
    forms = dict.fromkeys(("qkv", "o", "experts"), fp4)
    plan = DecoderPlan(shape, rows, forms, PROCESSORS[capability])
    return {name: compile_source(k.source, dict(k.constants), capability) for name, k in plan.wanted.items()}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_the_real_shape_compiles(capability: tuple[int, int]) -> None:
    for name, cubin in compiled(REAL, 32, capability, True).items():
        assert cubin.startswith(b"\x7fELF"), name


@pytest.mark.parametrize("capability", list(PROCESSORS), ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_one_row_compiles_for_every_gpu(capability: tuple[int, int]) -> None:
    for name, cubin in compiled(SMALL, 1, capability, True).items():
        assert cubin.startswith(b"\x7fELF"), name


@pytest.mark.parametrize("fp4", [True, False], ids=["fp4", "bf16"])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_small_shape_compiles(rows: int, fp4: bool) -> None:
    assert all(cubin.startswith(b"\x7fELF") for cubin in compiled(SMALL, rows, (9, 0), fp4).values())


def test_a_source_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = {"TOPK": 0, "HIDDEN": 256, "THREADS": 256}
    first = compile_source("norm.cu", constants, (9, 0))
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_source("norm.cu", constants, (9, 0)) == first
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(KernelCompileError, match=r"norm\.cu does not compile .*sm_90.*error"):
        compile_source("norm.cu", {"TOPK": 0, "HIDDEN": 256}, (9, 0))


def test_wide_experts_that_no_small_gpu_holds_are_refused() -> None:
    """BF16 experts of the real shape need more shared memory for several rows than a 4090 gives a block."""
    with pytest.raises(ValueError, match="2048 columns need more shared memory than 101376 bytes a block"):
        compiled(REAL, 8, (8, 9), False)
