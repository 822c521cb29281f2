"""Makes quantized checkpoints, changes them, and unpacks them by hand with code of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from small_checkpoints import E4M3, Tensor, Tensors, file_bytes, from_values, read_tensors

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def quantized(source: Path, out: Path, format: str, recipe: str, rule: str) -> Path:
    """Quantize with one thread and without the proof, which other rooms test."""
    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.formats.nvfp4 import ScaleRule
    from omnifp4.quantization.decisions import OutputFormat
    from omnifp4.quantization.plan import plan_job
    from omnifp4.quantization.run import run_job

    job = plan_job(open_checkpoint(source), recipe=recipe, rule=ScaleRule(rule), output_format=OutputFormat(format))
    run_job(job, out, threads=1)
    return out


def changed(
    source: Path,
    out: Path,
    tensors: Callable[[Tensors], None] = lambda _: None,
    config: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """A copy of a one-shard checkpoint whose tensors and config `tensors` and `config` have edited."""
    shutil.copytree(source, out)
    edited = read_tensors(source)
    tensors(edited)
    for path in out.glob("*.safetensors*"):
        path.unlink()
    (out / "model.safetensors").write_bytes(file_bytes(edited))
    told = json.loads((out / "config.json").read_text())
    config(told)
    (out / "config.json").write_text(json.dumps(told))
    return out


def unpacked(folder: Path) -> Tensors:
    """The checkpoint with wide weights: code * (block scale * tensor scale) in float32, rounded once to BF16."""
    stored = read_tensors(folder)
    wide = dict(stored)
    for name, tensor in stored.items():
        if tensor.dtype != "U8":
            continue
        module = name.removesuffix("_packed").removesuffix(".weight")
        factor = f"{module}.weight_scale_2" in stored
        scale_name = f"{module}.{'weight_scale_2' if factor else 'weight_global_scale'}"
        block, whole = E4M3[stored[f"{module}.weight_scale"].bits], stored[scale_name].bits.reshape(())
        scale = block * whole if factor else block / whole
        codes = np.stack([tensor.bits & 15, tensor.bits >> 4], axis=-1).reshape(tensor.bits.shape[0], -1)
        for key in (
            name,
            f"{module}.weight_scale",
            scale_name,
            f"{module}.input_scale",
            f"{module}.input_global_scale",
        ):
            wide.pop(key, None)
        wide[f"{module}.weight"] = from_values(E2M1[codes] * np.repeat(scale.astype(np.float32), 16, axis=1))
    return wide


def wide_model(transformers: Any, folder: Path, class_name: str) -> Any:
    """The same model with weights unpacked by hand, loaded by Transformers alone."""
    import torch

    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    state = {}
    for name, tensor in unpacked(folder).items():
        bits = torch.from_numpy(tensor.bits.copy())
        state[name] = bits.view(torch.bfloat16) if tensor.dtype == "BF16" else bits
    model = getattr(transformers, class_name).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, experts_implementation="eager"
    )
    if hasattr(model, "talker"):
        model.talker.config.audio_config = model.thinker.config.audio_config
    return model


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that two checkpoints do not have alike, bit by bit."""
    first, second = read_tensors(one), read_tensors(other)
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not first[n].same_as(second[n]))


def as_other_tool(tensors: Tensors, **extra: Tensor) -> None:
    """Give every packed linear of a compressed-tensors checkpoint the input scale of W4A4."""
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        scale = np.array([200.0 + len(name)], dtype=np.float32)
        tensors[name.replace("weight_packed", "input_global_scale")] = Tensor("F32", scale)
    tensors.update(extra)
