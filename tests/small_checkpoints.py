"""Small checkpoints of every known kind, and a safetensors reader and writer that share no code with the package."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifp4.models import layout_for
from omnifp4.tiny import write_random_checkpoint

ITEM_TYPES = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"), "F8_E4M3": np.dtype("u1"),
}  # fmt: skip
"""BF16 and FP8 as the bits they are."""

Config = dict[str, Any]

DECODER: Config = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS: Config = DECODER | {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
VISION: Config = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "patch_size": 4,
}
LLAMA: Config = {"model_type": "llama"} | DECODER
QWEN3: Config = {"model_type": "qwen3"} | DECODER
QWEN3_MOE: Config = {"model_type": "qwen3_moe"} | EXPERTS
QWEN3_VL_MOE: Config = {
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "text_config": EXPERTS,
    "vision_config": VISION,
}
MIXED_COMPONENTS = {
    "modelopt": ("thinker.attention=fp8", "thinker.head=fp8", "talker.attention=mxfp4", "talker.experts=fp8"),
    "compressed-tensors": (
        "thinker.experts=mxfp4", "thinker.attention=int8", "talker.attention=fp8", "talker.experts=fp8",
        "talker.shared_experts=int8", "talker.head=mxfp4", "talker.projections=nvfp4",
    ),
}  # fmt: skip
"""Every scheme of every dialect, in linears and in experts."""

BERT: Config = {
    "model_type": "bert",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
SMALL_CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "qwen3_vl_moe": QWEN3_VL_MOE, "bert": BERT}


@dataclass(frozen=True)
class Tensor:
    """Bits of one tensor and the type that a header gives them."""

    dtype: str
    bits: npt.NDArray[Any]

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """As float32; FP8 through the definition of E4M3."""
        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "F8_E4M3":
            return E4M3[self.bits]
        return self.bits.astype(np.float32)

    def same_as(self, other: Tensor) -> bool:
        return (
            self.dtype == other.dtype
            and self.bits.shape == other.bits.shape
            and self.bits.tobytes() == other.bits.tobytes()
        )


Tensors = dict[str, Tensor]


def _e4m3() -> npt.NDArray[np.float32]:
    table = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        value = float("nan") if byte & 127 == 127 else value
        table.append(-value if byte & 128 else value)
    return np.array(table, dtype=np.float32)


E4M3 = _e4m3()


def from_values(values: npt.NDArray[Any], dtype: str = "BF16") -> Tensor:
    """Values rounded to `dtype`; BF16 to nearest, ties to even."""
    if dtype != "BF16":
        return Tensor(dtype, np.ascontiguousarray(values, dtype=ITEM_TYPES[dtype]))
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    keep = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Tensor("BF16", np.where(keep, bits >> 16 | 0x40, rounded).astype(np.uint16))


def as_type(tensors: Tensors, dtype: str) -> Tensors:
    """All tensors in another type."""
    return {name: from_values(tensor.values, dtype) for name, tensor in tensors.items()}


def file_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.bits.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.bits.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.bits.tobytes() for tensor in tensors.values())


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Tensors, *, shards: int = 1) -> Path:
    """Config, shards and, for several, the index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(file_bytes(tensors))
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        (folder / name).write_bytes(file_bytes(part))
        weight_map.update(dict.fromkeys(part, name))
    total = sum(tensor.bits.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a file, and where its data begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of every shard."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, start = read_header(path)
        data = path.read_bytes()
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(data[begin:end], ITEM_TYPES[entry["dtype"]]).reshape(entry["shape"])
            assert name not in tensors, name
            tensors[name] = Tensor(entry["dtype"], bits)
    return tensors


def random_tensors(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Heavy-tailed BF16 tensors of every name that a config calls for; `folder` is used to make them."""
    return read_tensors(write_random_checkpoint(config, folder / f"random-{seed}", seed=seed, workers=1))


def fused(config: Config, tensors: Tensors, *, transposed: bool) -> Tensors:
    """The same weights with the experts of each layer in 3-D tensors."""
    result = dict(tensors)
    for form in layout_for(config).fused:
        if form.transposed is not transposed:
            continue
        experts = []
        for expert in range(form.shape[0]):
            parts = [result.pop(form.expert_tensor(expert, part)) for part in form.parts]
            whole = np.concatenate([part.bits for part in parts])
            experts.append(whole.T if transposed else whole)
        result[form.name] = Tensor(parts[0].dtype, np.ascontiguousarray(np.stack(experts)))
        assert result[form.name].bits.shape == form.shape
    return result


def linear_names(config: Config, *kinds: str) -> list[str]:
    """Names of the weights of all linears of components of these names."""
    return [spec.name for spec in layout_for(config).tensors if spec.is_linear and spec.component.name in kinds]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
