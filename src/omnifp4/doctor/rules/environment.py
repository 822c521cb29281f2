"""What is missing or does not fit in the environment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.rules.base import problem, told
from omnifp4.receipt.diagnosis import Explanation

PACKAGES: Final[Mapping[str, str]] = {
    "qwen_omni_utils": "qwen-omni-utils",
    "modelopt": "nvidia-modelopt",
    "vllm_omni": "vllm-omni",
    "compressed_tensors": "compressed-tensors",
    "flash_attn": "flash-attn --no-build-isolation",
    "PIL": "pillow",
    "auto_round": "auto-round",
}
"""What to install for a module whose package has another name."""


def torchvision(evidence: Evidence) -> Iterator[Explanation]:
    """A CUDA build of torchvision beside a CPU build of torch."""
    thrown = evidence.find(r"torchvision::nms does not exist") or evidence.printed(r"torchvision::nms does not exist")
    hidden = not thrown and evidence.find(r"Could not import module '\w*(Processor|VideoProcessor|ImageProcessor)\w*'")
    for found in thrown or hidden or ():
        yield problem(
            "environment.torchvision",
            "the processor cannot be built: torchvision does not import"
            if thrown
            else "the processor cannot be imported: something that it needs does not import",
            "PyPI's torchvision is a CUDA build; beside a CPU build of torch its operators are missing. Or it belongs to "
            "another release of torch (2.11 with 0.26, 2.13 with 0.28, 2.14 with 0.29), or is not installed",
            told(found),
            "import omnifp4   # before Transformers: declares the two operators where they are missing\n"
            "# or the builds of one place: pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
        )
        return


def missing_module(evidence: Evidence) -> Iterator[Explanation]:
    """A package that is not installed."""
    for thrown in evidence.find(r"No module named '?[\w.]+", "script", "thread", "load"):
        match = re.search(r"No module named '?([\w.]+)", thrown.whole)
        if match is None or "Could not import module" in thrown.text:
            continue
        name = match.group(1).partition(".")[0]
        yield problem(
            "environment.module",
            f"{name} is not installed",
            "the script imports it",
            told(thrown),
            f"pip install {PACKAGES.get(name, name)}",
        )
        return


def needs_package(evidence: Evidence) -> Iterator[Explanation]:
    """What Transformers asks for."""
    for pattern, name, fix in (
        (r"requires `?accelerate|Please install.{0,20}accelerate", "accelerate", "pip install accelerate, or leave device_map out and use model.to(device)"),
        (r"FlashAttention2? has been toggled on|flash_attn.{0,40}(not|doesn't seem to be) (installed|available)", "flash-attn", 'attn_implementation="sdpa", or pip install flash-attn --no-build-isolation'),
    ):  # fmt: skip
        for thrown in evidence.find(pattern):
            yield problem(
                f"environment.{name}",
                f"an argument of from_pretrained needs {name}, which is not installed",
                "device_map is carried out by accelerate"
                if name == "accelerate"
                else "attn_implementation asks for it",
                told(thrown),
                fix,
            )
            break


def no_cuda(evidence: Evidence) -> Iterator[Explanation]:
    """A GPU that is not there."""
    for thrown in evidence.seen(
        r"Torch not compiled with CUDA enabled|No CUDA GPUs are available|Found no NVIDIA driver"
    ):
        yield problem(
            "environment.no-cuda",
            "the script asks for a GPU, and torch sees none",
            "torch is a CPU build, or there is no GPU, or its driver is older than torch's CUDA",
            told(thrown),
            'device_map="cpu" or no device at all; omnifp4 doctor says what torch sees',
        )
        return


RULES = (torchvision, missing_module, needs_package, no_cuda)
