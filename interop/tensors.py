"""Reads safetensors checkpoints for the interop checks.

This file and its neighbours run in the environments of *other* tools, so they
import nothing of ours: only torch and safetensors, which every such environment has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open


class Usage(Exception):
    """The command line or an input file is wrong; the message says what to give."""


class Checkpoint:
    """The safetensors files of one folder (or one file), read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        """Indexes every tensor name under `path`.

        Args:
            path: a checkpoint folder, or a single safetensors file.

        Raises:
            Usage: nothing to read there, or a tensor name stands in two files.
        """
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise Usage(f"{path}: no safetensors file")
        self.path = path
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle is not iterable
                    if name in self._file_of:
                        raise Usage(f"{path}: {name} stands in two files")
                    self._file_of[name] = file

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._file_of

    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._file_of)

    def load(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""
        with safe_open(self._file_of[name], framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor

    def dtype(self, name: str) -> str:
        """The dtype of `name` as the file spells it, such as "BF16" or "U8"."""
        with safe_open(self._file_of[name], framework="pt") as handle:
            return str(handle.get_slice(name).get_dtype())

    def rank(self, name: str) -> int:
        """The number of dimensions of `name`."""
        with safe_open(self._file_of[name], framework="pt") as handle:
            return len(handle.get_slice(name).get_shape())

    def quantization_config(self) -> dict[str, Any]:
        """The top-level quantization_config of config.json.

        Raises:
            Usage: there is no config.json, or it has none.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise Usage(f"{self.path}: no config.json")
        config = json.loads(file.read_text()).get("quantization_config")
        if not isinstance(config, dict):
            raise Usage(f"{file}: no quantization_config at the top level")
        return config


def compare_weights(
    artifact: Checkpoint,
    expected: Checkpoint,
    modules: Iterable[str],
    dequantize: Callable[[str], torch.Tensor],
) -> int:
    """Dequantizes every module with another library and compares bit for bit.

    Args:
        artifact: the quantized checkpoint.
        expected: holds `X.weight` in BF16 for each quantized module X.
        modules: names X of the quantized linears in `artifact`.
        dequantize: gives the library's BF16 value of `X.weight`, shape [out, in].

    Returns:
        The number of failed checks; each is printed on a line of its own.
    """
    modules = list(modules)
    wanted = {name.removesuffix(".weight") for name in expected.names()}
    failures = 0

    def report(passed: bool, subject: str, detail: str) -> None:
        nonlocal failures
        failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {subject}: {detail}")

    report(bool(modules), str(artifact.path), f"{len(modules)} quantized linears")
    for module in sorted(wanted - set(modules)):
        report(False, module, "expected, but not quantized in the artifact")
    for module in modules:
        if module not in wanted:
            report(False, module, "quantized, but EXPECTED has no value for it")
            continue
        theirs, ours = dequantize(module), expected.load(f"{module}.weight")
        if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
            report(
                False,
                module,
                f"{theirs.dtype} {list(theirs.shape)} in the library, {ours.dtype} {list(ours.shape)} in EXPECTED",
            )
        elif torch.equal(theirs, ours):
            report(True, module, f"{ours.numel()} values equal")
        else:
            differs = theirs != ours
            worst = (theirs.float() - ours.float()).abs().max().item()
            report(
                False,
                module,
                f"{int(differs.sum())} of {ours.numel()} values differ, by up to {worst:g}",
            )
    return failures


def run(check: Callable[[list[str]], int], arguments: list[str]) -> NoReturn:
    """Runs `check` and exits: 0 all passed, 1 a check failed, 2 wrong usage."""
    try:
        failures = check(arguments)
    except Usage as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failures else 0)
