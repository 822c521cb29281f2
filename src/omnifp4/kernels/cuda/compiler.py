"""CUDA C++ to machine code with NVRTC, kept on disk.

NVRTC comes with torch's own CUDA wheels and its Python binding with ``cuda-bindings``: no toolkit is needed on the
machine, and the sources include no header. A source is compiled once per set of constants and GPU architecture.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from omnifp4.errors import OmniFP4Error

SOURCES: Final = Path(__file__).parent
COMMON: Final = "common.cuh"
CACHE_VARIABLE: Final = "OMNIFP4_CACHE"
LEAST_CAPABILITY: Final = (8, 0)
"""BF16 matrix instructions begin with Ampere."""


class KernelCompileError(OmniFP4Error):
    """NVRTC refused a source."""


def why_not_here() -> str:
    """Why sources cannot be compiled here; empty if they can."""
    try:
        found = find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    return "" if found else "cuda-bindings is not installed"


def compile_source(source: str, constants: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Compile one file of this folder.

    Args:
        source: its name, such as ``linear.cu``; ``common.cuh`` goes before it.
        constants: what the head of the file calls constants.
        capability: compute capability of the GPU, such as ``(9, 0)``.

    Returns:
        A cubin.

    Raises:
        KernelCompileError: with NVRTC's own words.
    """
    text = (SOURCES / COMMON).read_text(), (SOURCES / source).read_text()
    # FP4 decides the types in the common part, so every file has it.
    values = {"FP4": 1, **constants}
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in sorted(values.items())),
    ]
    program = "\n".join(text)
    version = _nvrtc_version()
    key = hashlib.sha256(repr((program, options, version)).encode()).hexdigest()[:32]
    kept = _cache_folder() / f"{Path(source).stem}-{key}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin = _compile(program, source, options)
    _keep(kept, cubin)
    return cubin


def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    _check(status, "nvrtcVersion")
    return int(major), int(minor)


def _compile(program: str, name: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    status, handle = nvrtc.nvrtcCreateProgram(program.encode(), name.encode(), 0, [], [])
    _check(status, name)
    try:
        (compiled,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        if int(compiled):
            log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle).decode(errors="replace")
            first = next((line for line in log.splitlines() if "error" in line), log.strip())
            raise KernelCompileError(f"kernel {name} does not compile ({' '.join(options)}): {first}")
        return _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def _bytes(size: Any, read: Any, handle: Any) -> bytes:
    status, nbytes = size(handle)
    _check(status, "size")
    buffer = b" " * nbytes
    (status,) = read(handle, buffer)
    _check(status, "read")
    return bytes(buffer)


def _check(status: Any, what: str) -> None:
    if int(status):
        raise KernelCompileError(f"NVRTC failed at {what}: {status}")


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnifp4"
    return base / "kernels"


def _keep(path: Path, cubin: bytes) -> None:
    """Other processes may write the same file at the same time: a rename makes it whole or not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin)
        Path(name).replace(path)
    except OSError:
        # A home that cannot be written costs the next process a second of compiling, nothing else.
        return
