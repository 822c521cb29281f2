"""What is known of the engines, as data: which versions belong together, what they read, what they refuse.

Read in or run with the newest releases of November 2026: vLLM 0.26 to 0.33, vLLM-Omni 0.26 to 0.30, SGLang 0.5.23,
TensorRT-Edge-LLM 0.9.1, Transformers 5.17 to 5.23. What nobody has read or run is "not known", not "can".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from omnifp4.doctor.versions import Span

RULES_VERSION: Final = 2
"""Raised when a row changes what it says."""

TRANSFORMERS, VLLM, VLLM_OMNI = "Transformers + omnifp4", "vLLM", "vLLM-Omni"
SGLANG, EDGE_LLM = "SGLang", "TensorRT-Edge-LLM"


@dataclass(frozen=True, slots=True)
class Needs:
    """What versions `of` a package need of another.

    Attributes:
        exact: only this version by its first two numbers.
        below: less than this version.
    """

    package: str
    of: Span
    other: str
    exact: str = ""
    below: str = ""


VERSION_PAIRS: Final = (
    Needs("vllm", Span("0.20", "0.26"), "torch", exact="2.11"),
    Needs("vllm", Span("0.27", "0.32"), "torch", exact="2.13"),
    Needs("vllm", Span("0.33", "0.33"), "torch", exact="2.14"),
    Needs("vllm", Span("0.33", "0.33"), "transformers", below="5.21"),
    Needs("vllm-omni", Span("0.30", "0.30"), "transformers", below="5.15"),
    Needs("sglang", Span("0.5", "0.5"), "transformers", exact="5.19"),
    Needs("torchvision", Span("0.26", "0.26"), "torch", exact="2.11"),
    Needs("torchvision", Span("0.28", "0.28"), "torch", exact="2.13"),
    Needs("torchvision", Span("0.29", "0.29"), "torch", exact="2.14"),
)

TRANSFORMERS_TESTED: Final = Span("5.17", "5.23")
VLLM_WITH_OMNI_THINKER: Final = Span("0.12")
"""Before, Qwen3-Omni is no known architecture."""
VLLM_READ: Final = Span("0.20", "0.33")
VLLM_NAMELESS_HEAD: Final = Span("0.26", "0.33")
"""Builds an omni thinker's ``lm_head`` without a name, so no ModelOpt entry can exclude it."""
VLLM_SCHEMES_READ: Final = Span("0.32", "0.32")
"""Whose code for FP8, MXFP4 and INT8 was read: all of compressed-tensors; of ModelOpt's form FP8 linears alone."""
VLLM_MODELOPT_UNREAD: Final = Span("", "0.32")
"""Reads neither MXFP4 nor INT8 from ModelOpt's form, nor experts in FP8 with a scale for each channel."""
VLLM_OMNI_READ: Final = Span("0.26", "0.30")
VLLM_OMNI_RELEASES: Final = Span("0.14", "0.30")
VLLM_OMNI_WITHOUT_MAPPER: Final = Span("0.26", "0.26")
"""Does not rename the entries of `ignore`: exact names and ``quantized_layers`` match nothing."""
VLLM_OMNI_TRITON_EXPERTS: Final = Span("0.30", "0.30")
"""Its deploy file pins ``moe_backend: triton``, which vLLM refuses for NVFP4."""
EDGE_LLM_WITH_OMNI: Final = Span("0.9")
SGLANG_SEEN: Final = "0.5.23"

NEWEST: Final[Mapping[str, str]] = {
    "vllm": "0.33",
    "vllm-omni": "0.30",
    "sglang": SGLANG_SEEN,
    "tensorrt-edgellm": "0.11",
}
"""What is assumed where an engine is not installed."""

INSTALL: Final[Mapping[str, str]] = {
    TRANSFORMERS: "pip install 'omnifp4[run]'",
    VLLM: "omnifp4 engine install vllm, which makes an environment of its own",
    VLLM_OMNI: "omnifp4 engine install vllm-omni, which makes an environment of its own",
    SGLANG: "pip install sglang, in an environment of its own",
    EDGE_LLM: "install TensorRT-Edge-LLM 0.9 or later on the Jetson (NVIDIA's installation guide)",
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """What runs NVFP4 on GPUs of a compute capability from `first` to `last`."""

    first: tuple[int, int]
    last: tuple[int, int]
    weights: str
    native: bool


KERNELS: Final = (
    Kernels((7, 5), (9, 9), "Marlin: FP4 weights, BF16 arithmetic (W4A16)", native=False),
    Kernels((10, 0), (10, 9), "FlashInfer on the FP4 units", native=True),
    Kernels((11, 0), (11, 9), "CUTLASS for experts, Marlin for W4A16 (Jetson Thor)", native=True),
    Kernels((12, 0), (12, 9), "CUTLASS on the FP4 units", native=True),
)

INVENTED_METHODS: Final = ("fp4", "nvfp4", "nvfp4_awq", "fp4_runtime", "w4a16_nvfp4", "modelopt-fp4")
"""Values of ``quantization=`` that people write and vLLM does not have."""

CONVERT: Final = "omnifp4 convert {model} OUT --format compressed-tensors"
INSTEAD_OF_BRANCHES: Final = (
    "omnifp4 serve {model} runs it here; for this engine quantize the original again, as with --recipe nvfp4-gptq"
)
TO_MODELOPT: Final = "omnifp4 convert {model} OUT --format modelopt"


def kernels_for(capability: str) -> Kernels | None:
    """What runs on a GPU of this compute capability; None: nothing known."""
    try:
        major, _, minor = capability.partition(".")
        here = (int(major), int(minor or 0))
    except ValueError:
        return None
    return next((row for row in KERNELS if row.first <= here <= row.last), None)


def broken_pairs(package: str, version: str, other_versions: Mapping[str, str]) -> list[str]:
    """What the installed versions of other packages are not, though `package` needs it."""
    from omnifp4.doctor.versions import minor

    told = []
    for row in VERSION_PAIRS:
        found = other_versions.get(row.other, "")
        if row.package != package or not found or not row.of.holds(version):
            continue
        wrong = (row.exact and minor(found) != minor(row.exact)) or (row.below and minor(found) >= minor(row.below))
        if wrong:
            wanted = f"{row.other} {row.exact}" if row.exact else f"{row.other} below {row.below}"
            told.append(f"{package} {version} needs {wanted}, and {found} is installed")
    return told
