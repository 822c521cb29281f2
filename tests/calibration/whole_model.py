"""The whole loaded model, and what one of its layers reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class Seen:
    """Inputs of the whole loaded thinker's second layer over all sequences, one behind the other."""

    LAYER = 1

    def __init__(self, folder: Path, sequences: list[Any], dtype: Any) -> None:
        import torch

        from omnifp4.runtime import load
        from omnifp4.segments.inputs import thinker_arguments

        model = load(folder, device="cpu", dtype=dtype, progress=False)
        thinker = getattr(model, "thinker", model)
        layer = thinker.get_decoder().layers[self.LAYER]
        sparse = hasattr(layer.mlp, "experts")
        entry = ("experts", layer.mlp.experts) if sparse else ("gate_up", layer.mlp.up_proj)
        modules = {"qkv": layer.self_attn.v_proj, "o_proj": layer.self_attn.o_proj, entry[0]: entry[1]}
        if hasattr(thinker, "get_image_features") or hasattr(thinker.model, "get_image_features"):
            towers = thinker if hasattr(thinker, "audio_tower") else thinker.model
            modules["vision"] = towers.visual.blocks[0].mlp.linear_fc2
            modules["audio"] = towers.audio_tower.layers[0].fc1
        modules["head"] = thinker.lm_head
        found: dict[str, list[Any]] = {name: [] for name in (*modules, "chosen")}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, values: Any, named: Any) -> None:
                x = values[0] if values else named["hidden_states"]
                found[name].append(x.detach().reshape(-1, x.shape[-1]))
                if name == "experts":
                    found["chosen"].append(values[1])

            return hook

        for name, module in modules.items():
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
        with torch.no_grad():
            for sequence in sequences:
                thinker(**thinker_arguments(thinker, sequence, torch.device("cpu")))
        self.inputs = {name: torch.cat(parts) for name, parts in found.items() if parts}
        self.layer = layer

    def routed(self, expert: int) -> Any:
        """Inputs of one expert's gate and up."""
        return self.inputs["experts"][(self.inputs["chosen"] == expert).any(-1)]

    def inner(self, expert: int, inputs: Any) -> Any:
        """Inputs of its down, worked out by hand."""
        import torch

        gate, up = (inputs @ self.layer.mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
