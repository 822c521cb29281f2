"""What the AWQ checks share: the folder that export_awq.py wrote, and how two results are compared.

Runs in the environments of other tools, like tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tensors import Checkpoint

TOLERANCE = 0.02
GROUPS = {
    "q/k/v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate/up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears that read one input and are scaled together; the first names it."""
SAME = "unbound-max"
"""Our way that has the peers' rule and factors: it must agree."""
NO_WORSE = ("lite", "full", "full-max")
"""Our ways that may be better. ``lite-max`` is printed and not judged: under the peers' rule, factors that are powers of two are
worse than free ones, and they are what leaves the router as it was."""


class Exported:
    """The wide weights, their inputs, and what each of our ways makes of them."""

    def __init__(self, folder: Path) -> None:
        """Opens what export_awq.py wrote."""
        self.folder = folder
        self._wide, self._ours = Checkpoint(folder / "llama"), Checkpoint(folder / "awq.safetensors")
        self.tokens = Checkpoint(folder / "tokens.safetensors").load("tokens")

    def layers(self) -> list[str]:
        """Prefixes of the layers, in order."""
        return sorted({name.partition(".self_attn")[0] for name in self._wide.names() if ".self_attn" in name})

    def weight(self, layer: str, group: str) -> torch.Tensor:
        """All linears of a group over each other, float32 ``[out, in]``."""
        return torch.cat([self._wide.load(f"{layer}.{part}.weight").float() for part in GROUPS[group]])

    def inputs(self, layer: str, group: str) -> torch.Tensor:
        """What they read, float32 ``[tokens, in]``."""
        return self._ours.load(f"inputs.{layer}.{GROUPS[group][0]}")

    def ours(self, way: str, layer: str, group: str) -> torch.Tensor:
        """What one of our ways makes of them, float32 ``[out, in]``."""
        return torch.cat([self._ours.load(f"{way}.{layer}.{part}") for part in GROUPS[group]])

    def error(self, values: torch.Tensor, layer: str, group: str) -> float:
        """``tr(D H D')`` of what `values` do to the inputs in place of the wide weights."""
        difference, inputs = values - self.weight(layer, group), self.inputs(layer, group)
        return float((inputs @ difference.mT).square().sum()) / len(inputs)


def compare(exported: Exported, layer: str, group: str, peer: str, theirs: Mapping[str, torch.Tensor]) -> int:
    """Prints our errors over the peer's, and counts promises that are broken.

    Args:
        exported: what we made.
        layer, group: of which linears.
        peer: its name.
        theirs: what it made of them, by ``plain`` (no AWQ), ``lite`` and, if it has it, ``full``.
    """
    errors = {way: exported.error(values, layer, group) for way, values in theirs.items()}
    parts = [f"its AWQ leaves {errors['lite'] / errors['plain']:.3f} of its rounding"]
    failures = 0
    for way in (*NO_WORSE, SAME, "lite-max"):
        against = "full" if way.startswith("full") else "lite"
        if against not in errors:
            continue
        ratio = exported.error(exported.ours(way, layer, group), layer, group) / errors[against]
        broken = (way == SAME and abs(ratio - 1) > TOLERANCE) or (way in NO_WORSE and ratio > 1 + TOLERANCE)
        parts.append(f"{way} {ratio:.3f}{' WRONG' if broken else ''}")
        failures += broken
    print(f"{layer}.{group}: error over {peer}'s: {', '.join(parts)}")
    return failures
