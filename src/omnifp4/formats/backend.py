"""Who encodes: the plain reference, compiled loops on the CPU, or a CUDA GPU. All write the same codes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from omnifp4.errors import OmniFP4Error
from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import EncodeStats, Float32Array, NVFP4Tensor, ScaleRule
from omnifp4.formats.widening import widen

BACKENDS: Final = ("auto", "reference", "cpu", "cuda")


class Backend(Protocol):
    """What encodes source values as they lie on disk."""

    @property
    def name(self) -> str: ...

    def encode(
        self,
        raw: npt.NDArray[Any],
        dtype: str,
        rule: ScaleRule = ScaleRule.SWEEP,
        *,
        tensor_scale: np.float32 | None = None,
        importance: Float32Array | None = None,
    ) -> tuple[NVFP4Tensor, EncodeStats]:
        """Encode ``[out, in]`` source values.

        Args:
            raw: BF16 as uint16 bits, F16 as float16 or its bits, F32 as float32 or its bits.
            dtype: ``"BF16"``, ``"F16"`` or ``"F32"``.
            rule: how scales are chosen.
            tensor_scale: given where several tensors share one; otherwise from this tensor.
            importance: float32 ``[in]`` or ``[out, in]``, see `reference.choose_block_scales`.

        Raises:
            ValueError: a shape or type does not fit, or a value is NaN, infinite or too large.
        """
        ...


def choose_backend(name: str = "auto") -> tuple[Backend, str]:
    """The backend of that name and the reason for the choice, a clause for people.

    Raises:
        OmniFP4Error: no such backend, or what it needs is missing; an explicit request never falls back.
    """
    if name == "reference":
        return _Reference(), "asked for: plain numpy"
    if name == "cpu":
        if _missing("numba"):
            raise OmniFP4Error("backend 'cpu' needs numba, which is not installed", hint="pip install numba")
        return _Cpu(), "asked for: compiled loops on the CPU"
    if name == "cuda":
        device = _require_cuda()
        return _Cuda(), f"asked for: {device}"
    if name != "auto":
        raise OmniFP4Error(f"backend {name!r} does not exist", hint=f"choose one of {', '.join(BACKENDS)}")
    if _missing("numba"):
        return _Reference(), "numba is not installed, so plain numpy encodes, slowly"
    return _Cpu(), "compiled loops on one core encode faster than most disks read; a GPU is used when asked for"


def encode(
    weight: Float32Array,
    rule: ScaleRule = ScaleRule.SWEEP,
    *,
    tensor_scale: np.float32 | None = None,
    importance: Float32Array | None = None,
    backend: str = "auto",
) -> NVFP4Tensor:
    """Encode a float32 ``[out, in]`` weight; arguments as in `Backend.encode`, errors also as in `choose_backend`."""
    chosen, _ = choose_backend(backend)
    values = np.asarray(weight, dtype=np.float32)
    return chosen.encode(values, "F32", rule, tensor_scale=tensor_scale, importance=importance)[0]


def _missing(module: str) -> bool:
    return find_spec(module) is None


def _require_cuda() -> str:
    for module, command in (("torch", "pip install 'omnifp4[torch]'"), ("triton", "pip install triton")):
        if _missing(module):
            raise OmniFP4Error(f"backend 'cuda' needs {module}, which is not installed", hint=command)
    import torch

    if not torch.cuda.is_available():
        raise OmniFP4Error("backend 'cuda' needs a CUDA GPU, and torch sees none", hint="use --backend cpu")
    return torch.cuda.get_device_name()


class _Reference:
    name: Final = "reference"

    def encode(
        self,
        raw: npt.NDArray[Any],
        dtype: str,
        rule: ScaleRule = ScaleRule.SWEEP,
        *,
        tensor_scale: np.float32 | None = None,
        importance: Float32Array | None = None,
    ) -> tuple[NVFP4Tensor, EncodeStats]:
        wide = widen(raw, dtype)
        encoded = reference.encode(wide, rule, tensor_scale=tensor_scale, importance=importance)
        difference = wide.astype(np.float64) - reference.decode(encoded)
        energy = np.square(wide, dtype=np.float64).sum()
        return encoded, EncodeStats(float(np.square(difference).sum()), float(energy))


class _Cpu:
    name: Final = "cpu"

    def encode(
        self,
        raw: npt.NDArray[Any],
        dtype: str,
        rule: ScaleRule = ScaleRule.SWEEP,
        *,
        tensor_scale: np.float32 | None = None,
        importance: Float32Array | None = None,
    ) -> tuple[NVFP4Tensor, EncodeStats]:
        from omnifp4.formats import fast_cpu

        return fast_cpu.encode(raw, dtype, rule, tensor_scale=tensor_scale, importance=importance)


class _Cuda:
    name: Final = "cuda"

    def encode(
        self,
        raw: npt.NDArray[Any],
        dtype: str,
        rule: ScaleRule = ScaleRule.SWEEP,
        *,
        tensor_scale: np.float32 | None = None,
        importance: Float32Array | None = None,
    ) -> tuple[NVFP4Tensor, EncodeStats]:
        import torch

        from omnifp4.formats import fast_cuda

        types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        if dtype not in types:
            raise ValueError(f"dtype {dtype!r} is none of {', '.join(types)}")
        bits = np.ascontiguousarray(raw).view(np.int32 if dtype == "F32" else np.int16)
        weight = torch.from_numpy(bits).view(types[dtype]).cuda()
        done = fast_cuda.encode_cuda(
            weight,
            rule,
            None if tensor_scale is None else torch.tensor(float(tensor_scale)),
            None if importance is None else torch.from_numpy(np.ascontiguousarray(importance)),
        )
        encoded = NVFP4Tensor(
            done.packed.cpu().numpy(), done.block_scale.cpu().numpy(), np.float32(done.tensor_scale.item())
        )
        return encoded, EncodeStats(done.squared_error.item(), done.energy.item())
