"""Out of memory, on the GPU or on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.fit import list_loads
from omnifp4.doctor.rules.base import problem, told
from omnifp4.receipt.diagnosis import Explanation

GPU: Final = r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|No available memory for the cache blocks|KV cache.{0,60}larger than the maximum"
HOST: Final = r"\bMemoryError\b|can't allocate memory|Cannot allocate memory|std::bad_alloc"
KILLED: Final = -9


def on_gpu(evidence: Evidence) -> Iterator[Explanation]:
    """The GPU's memory."""
    for thrown in evidence.seen(GPU):
        in_vllm = bool(evidence.vllm) or "cache blocks" in thrown.whole or "gpu_memory_utilization" in thrown.whole
        fix = "lower --max-model-len first, then --gpu-memory-utilization if other programs share the GPU" if in_vllm else (
            "return_audio=False and speech=False leave the talker out; a shorter prompt; NVFP4 in place of BF16"
        )  # fmt: skip
        yield problem(
            "memory.gpu",
            "the GPU's memory is too small for what was asked of it",
            "weights, KV cache and activations together do not fit; the table says what does",
            [*told(thrown), *_needs(evidence)],
            f"{fix}\nomnifp4 doctor PATH shows for which context and batch it fits",
        )
        return


def on_host(evidence: Evidence) -> Iterator[Explanation]:
    """RAM: refused, or the process was killed."""
    thrown = evidence.find(HOST)
    if not thrown and evidence.status != KILLED:
        return
    lines = told(thrown[0]) if thrown else ["the system ended the process (signal 9), as it does when memory runs out"]
    loading = evidence.is_loading or any(t.phase == "load" for t in thrown)
    yield problem(
        "memory.host",
        "there is too little RAM" + (" to load the model" if loading else ""),
        "weights and what is made of them do not fit; without a device_map a model is built in RAM first",
        [*lines, *_needs(evidence)],
        "omnifp4.load(path) streams: its peak is near one tensor; NVFP4 in place of BF16\n"
        "omnifp4 doctor PATH shows for which context and batch it fits",
    )


def _needs(evidence: Evidence) -> list[str]:
    found = []
    for load, facts in evidence.loaded():
        for parts in list_loads(facts):
            found.append(f"{load.path}: {parts.name} is {parts.weight_bytes / 1e9:.3g} GB of weights")
    return found[:3]


RULES = (on_gpu, on_host)
