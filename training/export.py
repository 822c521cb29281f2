"""The trained model as a checkpoint, and what its numbers look like."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.architecture import trained_config

PARTS = {"thinker.safetensors": ("thinker.",), "speech.safetensors": ("talker.", "code2wav.")}
"""Files of the exported model, and which names each holds."""


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor in BF16 by its name in a checkpoint.

    Raises:
        SystemExit: the names or shapes are not those of the layout.
    """
    from safetensors.torch import load_file

    from omnifp4.models import layout_for

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="1GB")
        saved: dict[str, Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            saved |= load_file(path)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in saved.items()}
    needed = {tensor.name: tensor.shape for tensor in layout_for(trained_config()).tensors if not tensor.optional}
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    if {name: shape for name, shape in have.items() if name in needed} != needed:
        wrong = sorted(set(needed) - set(have)) or [name for name in needed if have[name] != needed[name]]
        raise SystemExit(f"the exported names are not the layout's: {wrong[:5]}")
    return {name: tensors[name] for name in needed}


def write(model: Any, helpers: dict[str, Any], out: Path) -> None:
    """Writes the parts, the config and the helpers to `out`.

    Args:
        model: the whole model.
        helpers: modules that are no part of it, by name; as float16 in ``helpers.safetensors``.
        out: a folder.
    """
    from safetensors.torch import save_file

    tensors = checkpoint_tensors(model)
    for file, prefixes in PARTS.items():
        part = {name: value for name, value in tensors.items() if name.startswith(prefixes)}
        partial = out / f"{file}.partial"
        save_file(part, partial, metadata={"format": "pt"})
        partial.replace(out / file)
    weights = {f"{name}.{key}": value for name, one in helpers.items() for key, value in one.state_dict().items()}
    weights = {name: value.half().contiguous().cpu() for name, value in weights.items()}
    partial = out / "helpers.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(out / "helpers.safetensors")
    (out / "config.json").write_text(json.dumps(trained_config(), indent=2) + "\n")


def read(model: Any, folder: Path) -> dict[str, Tensor]:
    """Takes the weights of an earlier result.

    Args:
        model: the whole model, on the CPU; takes the weights.
        folder: what a training wrote: the parts and ``helpers.safetensors``.

    Returns:
        The weights of what is no part of the model (judge, ear and encoder), float32, by name.
    """
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3OmniMoeForConditionalGeneration

    tensors: dict[str, Tensor] = {}
    for file in PARTS:
        tensors |= load_file(folder / file)
    with tempfile.TemporaryDirectory() as place:
        save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
        (Path(place) / "config.json").write_text(json.dumps(trained_config()))
        stock = Qwen3OmniMoeForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    model.load_state_dict(stock.state_dict())
    helpers = load_file(folder / "helpers.safetensors")
    return {name: value.float() for name, value in helpers.items()}


def spread(values: Tensor) -> dict[str, float]:
    """Excess kurtosis and the largest value over the root mean square."""
    values = values.detach().float().flatten()
    centred = values - values.mean()
    second = centred.square().mean()
    return {
        "excess_kurtosis": float(centred.pow(4).mean() / second.square() - 3),
        "max_over_rms": float(values.abs().max() / values.square().mean().sqrt()),
    }


def weight_spread(model: Any) -> dict[str, dict[str, float]]:
    """`spread` of the linear weights of the thinker's and talker's decoders, by kind, the mean over layers."""
    found: dict[str, list[dict[str, float]]] = {}
    for part, decoder in (("thinker", model.thinker.get_decoder()), ("talker", model.talker.model)):
        for name, parameter in decoder.named_parameters():
            if parameter.ndim > 1 and ".layers." in f".{name}":
                kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
                found.setdefault(f"{part} {kind}", []).append(spread(parameter))
    return {kind: {key: sum(one[key] for one in many) / len(many) for key in many[0]} for kind, many in found.items()}


@torch.no_grad()
def activation_spread(model: Any, run: Any) -> dict[str, dict[str, float]]:
    """`spread` of what enters each decoder layer's attention and experts, and of the stream between layers.

    Args:
        model: the whole model.
        run: runs the thinker on a batch.
    """
    found: dict[str, list[Tensor]] = {}
    hooks = []

    def keep(name: str) -> Any:
        return lambda _, __, output: found.setdefault(name, []).append(
            (output[0] if isinstance(output, tuple) else output).detach().float()
        )

    for number, layer in enumerate(model.thinker.get_decoder().layers):
        hooks.append(layer.register_forward_hook(keep(f"layer {number} stream")))
        hooks.append(layer.input_layernorm.register_forward_hook(keep(f"layer {number} attention input")))
        hooks.append(layer.post_attention_layernorm.register_forward_hook(keep(f"layer {number} experts input")))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: spread(torch.cat([one.flatten() for one in many])) for name, many in sorted(found.items())}
