"""Artifacts made for the tests by a few lines on the reference arithmetic, and by nothing of the quantizer's."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import ScaleRule
from omnifp4.models import Kind, Layout, Part, layout_for
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.verification import Check, VerificationReceipt
from omnifp4.verification import verify

FP4_KINDS = (Kind.ATTENTION, Kind.EXPERTS, Kind.MLP)
MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"

IGNORE = {
    MODELOPT: ["lm_head", "*.mlp.gate", "thinker.visual*", "thinker.audio_tower*", "talker*", "code2wav*"],
    COMPRESSED: [
        r"re:.*lm_head$",
        r"re:.*\.mlp\.gate$",
        r"re:.*visual\..*",
        r"re:.*audio_tower\..*",
        r"re:.*talker\..*",
        r"re:.*code2wav\..*",
    ],
}

Stored = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, bytes."""


@dataclass
class Artifact:
    """A checkpoint in memory, to be damaged and written."""

    tensors: dict[str, Stored]
    config: dict[str, Any]
    side: dict[str, bytes] = field(default_factory=dict)
    """Files beside the weights."""

    def copy(self) -> Artifact:
        return Artifact(dict(self.tensors), copy.deepcopy(self.config), dict(self.side))

    def bits(self, name: str) -> np.ndarray:
        """A fresh array of the tensor's bytes, of its shape where elements are bytes."""
        dtype, shape, data = self.tensors[name]
        array = np.frombuffer(data, np.uint8).copy()
        return array.reshape(shape) if dtype in ("U8", "F8_E4M3") else array

    def put(self, name: str, array: np.ndarray) -> None:
        """Replace the bytes; type and shape stay."""
        dtype, shape, data = self.tensors[name]
        assert array.nbytes == len(data)
        self.tensors[name] = (dtype, shape, array.tobytes())

    def put_scalar(self, name: str, value: float) -> None:
        self.put(name, np.float32(value).reshape(1))

    def scalar(self, name: str) -> float:
        return float(np.frombuffer(self.tensors[name][2], "<f4")[0])

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def rename(self, old: str, new: str) -> None:
        """Replace a part of every tensor's name."""
        self.tensors = {name.replace(old, new): stored for name, stored in self.tensors.items()}

    def write(self, folder: Path, shards: int = 1) -> Path:
        """Write shards, index and side files into a folder of their own; one of that name is replaced."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, data in self.side.items():
            (folder / name).write_bytes(data)
        names = list(self.tensors)
        weight_map: dict[str, str] = {}
        for number in range(shards):
            file_name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_safetensors(folder / file_name, {name: self.tensors[name] for name in part})
            weight_map.update(dict.fromkeys(part, file_name))
        if shards > 1:
            total = sum(len(data) for _, _, data in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def receipt(self, **extra: Any) -> bytes:
        """What omnifp4.json holds of interest here."""
        sums = {name: zlib.crc32(data) for name, (_, _, data) in self.tensors.items()}
        return json.dumps({"receipt": "quantization", "tensors": sums, **extra}).encode()


def save_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def load_folder(folder: Path) -> Artifact:
    """A wide checkpoint, read into memory without the reader under test."""
    tensors: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in info["data_offsets"])
                tensors[name] = (info["dtype"], tuple(info["shape"]), data[begin:end])
    side = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json")
    }
    return Artifact(tensors, json.loads((folder / "config.json").read_text()), side)


def widen(stored: Stored) -> np.ndarray:
    dtype, shape, data = stored
    assert dtype == "BF16"
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)


def narrow(values: np.ndarray) -> bytes:
    """BF16 bytes, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def default_fp4(layout: Layout) -> set[str]:
    """Modules that the default recipe makes FP4."""
    return {
        spec.module
        for spec in layout.tensors
        if spec.is_linear and spec.component.part is Part.THINKER and spec.component.kind in FP4_KINDS
    }


def quantize(
    wide: Artifact,
    dialect: str,
    *,
    w4a4: bool = False,
    rule: ScaleRule = ScaleRule.MAX,
    ignore: list[str] | None = None,
) -> Artifact:
    """Encode the thinker's attention and experts, with one tensor scale for each fused group."""
    layout = layout_for(wide.config, wide.tensors)
    fp4 = default_fp4(layout)
    amax: dict[str, float] = {}
    for spec in layout.tensors:
        if spec.module in fp4 and spec.is_linear:
            key = spec.scale_group or spec.name
            amax[key] = max(amax.get(key, 0.0), float(np.abs(widen(wide.tensors[spec.name])).max()))
    out = Artifact({}, copy.deepcopy(wide.config), dict(wide.side))
    for name, stored in wide.tensors.items():
        spec = layout.by_name.get(name)
        if spec is None or not spec.is_linear or spec.module not in fp4:
            out.tensors[name] = stored
            continue
        scale = reference.tensor_scale_for(amax[spec.scale_group or spec.name], rule)
        encoded = reference.encode(widen(stored), rule, tensor_scale=scale)
        rows, columns = spec.shape
        modelopt = dialect == MODELOPT
        number = scale if modelopt else np.float32(1) / scale
        shape: tuple[int, ...] = () if modelopt else (1,)
        module = spec.module
        packed = f"{module}.weight" if modelopt else f"{module}.weight_packed"
        out.tensors[packed] = ("U8", (rows, columns // 2), encoded.packed.tobytes())
        out.tensors[f"{module}.weight_scale"] = ("F8_E4M3", (rows, columns // 16), encoded.block_scale.tobytes())
        name = f"{module}.weight_scale_2" if modelopt else f"{module}.weight_global_scale"
        out.tensors[name] = ("F32", shape, np.float32(number).tobytes())
        if w4a4:
            name = f"{module}.input_scale" if modelopt else f"{module}.input_global_scale"
            out.tensors[name] = ("F32", shape, np.float32(0.01 if modelopt else 100.0).tobytes())
    out.config["quantization_config"] = quantization_config(
        dialect, w4a4, IGNORE[dialect] if ignore is None else ignore
    )
    return out


def quantization_config(dialect: str, w4a4: bool, ignore: list[str]) -> dict[str, Any]:
    """As ModelOpt 0.47 and compressed-tensors 0.19 write it."""
    number: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    if dialect == MODELOPT:
        group: dict[str, Any] = {"weights": number, "targets": ["Linear"]}
        if w4a4:
            group["input_activations"] = number
        return {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4" if w4a4 else "W4A16_NVFP4",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "producer": {"name": "modelopt", "version": "0.47.0"},
        }
    number |= {"strategy": "tensor_group", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": number,
                "input_activations": {**number, "dynamic": "local"} if w4a4 else None,
                "output_activations": None,
                "format": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def failing(receipt: VerificationReceipt) -> dict[str, Check]:
    """The checks that failed, by name."""
    return {check.name: check for check in receipt.checks if check.verdict is Verdict.FAIL}


def check_of(receipt: VerificationReceipt, name: str) -> Check:
    return next(check for check in receipt.checks if check.name == name)


def assert_fails(receipt: VerificationReceipt, expected: set[str], *words: str) -> None:
    """Exactly these checks fail, and their findings or summaries have these words."""
    failed = failing(receipt)
    assert set(failed) == expected, {name: check.findings[:3] for name, check in failed.items()}
    assert receipt.verdict is (Verdict.FAIL if expected else Verdict.PASS)
    text = "\n".join(line for check in failed.values() for line in (check.summary, *check.findings))
    for word in words:
        assert word in text, text
    for check in failed.values():
        assert check.findings
        assert check.finding_count >= len(check.findings)
        assert check.fix


__all__ = ["Artifact", "assert_fails", "check_of", "failing", "load_folder", "narrow", "quantize", "verify", "widen"]
