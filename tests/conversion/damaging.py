"""Artifacts as editable objects: read whole, damaged, written again."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifp4.formats.fast_cpu import decode_into, effective_scale
from small_checkpoints import Tensor, Tensors, file_bytes, read_tensors

WEIGHT_FILES = {"model.safetensors.index.json"}
SCALES = {"modelopt": ".weight_scale_2", "compressed-tensors": ".weight_global_scale"}
INPUTS = {"modelopt": ".input_scale", "compressed-tensors": ".input_global_scale"}
CODES = {"modelopt": ".weight", "compressed-tensors": ".weight_packed"}


class Damaged:
    """An artifact in memory.

    Attributes:
        config: of config.json.
        tensors: by name.
        files: everything else, by name; omnifp4.json is left out unless asked for.
        place: shard of each tensor.
    """

    def __init__(self, folder: Path, *, receipt: bool = False) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors: Tensors = read_tensors(folder)
        self.files = {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if path.is_file() and path.suffix != ".safetensors" and path.name not in {"config.json", *WEIGHT_FILES}
        }
        if not receipt:
            self.files.pop("omnifp4.json", None)
        self.dialect = "modelopt" if self.config["quantization_config"]["quant_method"] == "modelopt" else (
            "compressed-tensors"
        )  # fmt: skip
        self.index: Any = None

    def copy(self) -> Damaged:
        return copy.deepcopy(self)

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def codes(self, module: str) -> npt.NDArray[np.uint8]:
        """A writable view of the codes."""
        return self._writable(module + CODES[self.dialect])

    def block_scales(self, module: str) -> npt.NDArray[np.uint8]:
        """A writable view of the block scales."""
        return self._writable(f"{module}.weight_scale")

    def _writable(self, name: str) -> npt.NDArray[np.uint8]:
        tensor = self.tensors[name]
        self.tensors[name] = Tensor(tensor.dtype, tensor.bits.copy())
        return self.tensors[name].bits

    def tensor_scale(self, module: str) -> np.float32:
        return np.float32(self.tensors[module + SCALES[self.dialect]].bits.reshape(-1)[0])

    def set_tensor_scale(self, module: str, value: float) -> None:
        name = module + SCALES[self.dialect]
        self.tensors[name] = Tensor("F32", np.full(self.tensors[name].bits.shape, value, dtype="<f4"))

    def drop(self, *names: str) -> None:
        for name in names:
            del self.tensors[name]

    @property
    def modules(self) -> list[str]:
        return [name.removesuffix(".weight_scale") for name in self.tensors if name.endswith(".weight_scale")]

    def make_w4a4(self, value: float = 0.03125) -> None:
        """Add input scales and say so in the config."""
        for module in self.modules:
            number = value if self.dialect == "modelopt" else 1 / value
            shape = () if self.dialect == "modelopt" else (1,)
            self.tensors[module + INPUTS[self.dialect]] = Tensor("F32", np.full(shape, number, dtype="<f4"))
        group = self.quantization["config_groups"]["group_0"]
        group["input_activations"] = dict(group["weights"])
        if self.dialect == "modelopt":
            self.quantization["quant_algo"] = "NVFP4"

    def write(self, folder: Path, shards: int = 1) -> Path:
        """Write it; with several shards, tensors are dealt out in turn."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        weight_map = {}
        names = list(self.tensors)
        for number in range(shards):
            file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: self.tensors[name] for name in names[number::shards]}
            (folder / file).write_bytes(file_bytes(part))
            weight_map.update(dict.fromkeys(part, file))
        if shards > 1:
            size = sum(tensor.bits.nbytes for tensor in self.tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self._fit_receipt(folder)
        return folder

    def _fit_receipt(self, folder: Path) -> None:
        """Headers written here have other sizes than the package's; the record shall not find fault with that."""
        path = folder / "omnifp4.json"
        if path.exists() and path.read_bytes().startswith(b'{"'):
            sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
            receipt = json.loads(path.read_text()) | {"shards": sizes, "weight_bytes": sum(sizes.values())}
            path.write_text(json.dumps(receipt))

    def values(self) -> dict[str, npt.NDArray[np.uint16]]:
        """BF16 bits of every decoded linear."""
        return {module: self.value(module) for module in self.modules}

    def value(self, module: str) -> npt.NDArray[np.uint16]:
        codes = self.tensors[module + CODES[self.dialect]].bits
        scale = effective_scale(
            self.tensors[f"{module}.weight_scale"].bits,
            self.tensor_scale(module),
            reciprocal=self.dialect == "compressed-tensors",
        )
        out = np.empty((codes.shape[0], codes.shape[1] * 2), dtype=np.uint16)
        decode_into(codes, scale, out)
        return out


def same_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
