"""How vLLM and vLLM-Omni name the modules of a checkpoint, and which of them they build with a quantization config.

An engine first renames the entries of the config, then asks it about each module under the module's own name, in which
q/k/v, gate/up and all experts of a layer are one. Read in vLLM 0.26 to 0.33 and vLLM-Omni 0.28 and 0.30.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

EXPERT: Final = re.compile(r"^(?P<experts>.*\.experts)\.\d+\.(?:gate|up|down)_proj$")

FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

_FUSED_NAME: Final = {part: fused for fused, parts in FUSED.items() for part in parts}


@dataclass(frozen=True, slots=True)
class Stage:
    """One engine process.

    Attributes:
        title: for findings.
        renames: prefixes replaced in entries and names, in order.
        asked: checkpoint names of the modules that it builds with the quantization config.
        unnamed_head: checkpoint name of a head that it builds without a name, so that no entry can reach it.
    """

    title: str
    renames: tuple[tuple[str, str], ...]
    asked: re.Pattern[str]
    unnamed_head: str = ""

    def module_name(self, module: str) -> str:
        """The engine's name of a checkpoint module."""
        return self.rename(f"{module}.weight").removesuffix(".weight")

    def rename(self, name: str) -> str:
        """The form in which it compares an entry of the config."""
        for old, new in self.renames:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name


_OMNI_RENAMES: Final = (
    ("thinker.lm_head.", "language_model.lm_head."),
    ("thinker.model.", "language_model.model."),
    ("thinker.", ""),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_VLLM_OMNI_RENAMES: Final = (
    ("thinker.lm_head", "thinker.language_model.lm_head"),
    ("thinker.model", "thinker.language_model.model"),
    ("talker.model", "talker.language_model.model"),
)
_VL_RENAMES: Final = (
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)

_EVERYTHING: Final = re.compile("")

STAGES: Final[Mapping[str, tuple[Stage, ...]]] = {
    "qwen3_omni_moe": (
        Stage("vLLM", _OMNI_RENAMES, re.compile(r"thinker\.(model\.layers|visual)\."), "thinker.lm_head"),
        Stage("vLLM-Omni, thinker", _VLLM_OMNI_RENAMES, re.compile(r"thinker\.(model\.layers\.|lm_head$)")),
        Stage("vLLM-Omni, talker", _VLLM_OMNI_RENAMES, re.compile(r"talker\.model\.layers\.(?!.*shared_expert_gate$)")),
    ),
    "qwen3_omni_moe_thinker": (Stage("vLLM", _OMNI_RENAMES, re.compile(r"(thinker\.)?(model\.layers|visual)\.")),),
    "qwen2_5_omni": (Stage("vLLM", _OMNI_RENAMES, re.compile(r"thinker\.(model\.layers|visual)\.")),),
    "qwen3_vl_moe": (Stage("vLLM", _VL_RENAMES, _EVERYTHING),),
    "qwen3_moe": (Stage("vLLM", (), _EVERYTHING),),
    "qwen3": (Stage("vLLM", (), _EVERYTHING),),
    "llama": (Stage("vLLM", (), _EVERYTHING),),
}
"""What each model type runs as; types that no engine reads as NVFP4 are not listed."""


def fused_name(name: str) -> str:
    """The module that the engine builds from the unfused module `name`."""
    if expert := EXPERT.match(name):
        return expert["experts"]
    parent, dot, leaf = name.rpartition(".")
    fused = _FUSED_NAME.get(leaf)
    return f"{parent}{dot}{fused}" if fused and ".visual." not in f".{name}" else name


def group_modules(stage: Stage, modules: Iterable[str]) -> dict[str, list[str]]:
    """Checkpoint modules by the engine's module that they become part of; others are left out."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        if stage.asked.match(module) and module != stage.unnamed_head:
            groups.setdefault(fused_name(stage.module_name(module)), []).append(module)
    return groups
