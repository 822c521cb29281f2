"""Loads compiled kernels and launches them on torch's current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.errors import OmniFP4Error
from omnifp4.kernels.cuda.compiler import compile_source

Argument = Tensor | int | float | None
DEPENDENT_LAUNCH: Final = (9, 0)
"""From this compute capability on a kernel may start while the one before it ends."""


@dataclass(frozen=True)
class Kernel:
    """A kernel on one device.

    Attributes:
        name: of the function.
        threads: of a block.
        handle: what the driver calls it.
        dependent: it may start before the kernel ahead of it has ended (and waits by itself where it must).
        shared_bytes: of a block, beside what the source declares.
    """

    name: str
    threads: int
    handle: Any
    dependent: bool
    shared_bytes: int = 0

    def launch(self, grid: Sequence[int], *arguments: Argument) -> None:
        """Enqueue it.

        Args:
            grid: blocks, one to three numbers.
            arguments: as the kernel declares them: a tensor or None for a pointer, int for ``int`` and ``u32``, float
                for ``float``. The caller keeps tensors alive.
        """
        from cuda.bindings import driver

        values = tuple(_value(argument) for argument in arguments)
        types = tuple(_type(argument) for argument in arguments)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if self.dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        (status,) = driver.cuLaunchKernelEx(config, self.handle, (values, types), 0)
        _check(status, f"launch of {self.name}")


@dataclass(frozen=True)
class Wanted:
    """A kernel to load: file, function, threads of a block, constants, bytes of shared memory beside the declared."""

    source: str
    name: str
    threads: int
    constants: tuple[tuple[str, int], ...]
    shared_bytes: int = 0


def wanted(source: str, name: str, threads: int, *, shared_bytes: int = 0, **constants: int) -> Wanted:
    """See `Wanted`."""
    return Wanted(source, name, threads, tuple(sorted(constants.items())), shared_bytes)


_loaded: dict[tuple[int, str, tuple[tuple[str, int], ...]], Any] = {}


def load_kernels(kernels: Mapping[str, Wanted], device: torch.device, *, dependent: bool = True) -> dict[str, Kernel]:
    """Compile and load kernels, several at a time.

    Args:
        kernels: by a name of the caller's.
        device: a CUDA device.
        dependent: use dependent launches where the GPU has them.

    Raises:
        OmniFP4Error: a source does not compile, or the driver refuses it.
    """
    from cuda.bindings import driver

    torch.cuda.init()  # type: ignore[no-untyped-call]
    index = device.index if device.index is not None else torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(index)
    missing = {(k.source, k.constants) for k in kernels.values() if (index, k.source, k.constants) not in _loaded}
    with ThreadPoolExecutor(8) as pool:
        cubins = list(pool.map(lambda one: (one, compile_source(one[0], dict(one[1]), capability)), sorted(missing)))
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        for (source, constants), cubin in cubins:
            status, library = driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
            _check(status, f"loading {source}")
            _loaded[index, source, constants] = library
        found = {}
        for key, kernel in kernels.items():
            status, function = driver.cuLibraryGetKernel(
                _loaded[index, kernel.source, kernel.constants], kernel.name.encode()
            )
            _check(status, f"finding {kernel.name}")
            status, handle = driver.cuKernelGetFunction(function)
            _check(status, f"finding {kernel.name}")
            if kernel.shared_bytes:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = driver.cuFuncSetAttribute(handle, attribute, kernel.shared_bytes)
                _check(status, f"{kernel.shared_bytes} bytes of shared memory for {kernel.name}")
            is_dependent = dependent and capability >= DEPENDENT_LAUNCH
            found[key] = Kernel(kernel.name, kernel.threads, handle, is_dependent, kernel.shared_bytes)
    return found


def _value(argument: Argument) -> int | float:
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument


def _type(argument: Argument) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int


def _check(status: Any, what: str) -> None:
    if int(status):
        raise OmniFP4Error(f"CUDA driver: {what} failed: {status}")
