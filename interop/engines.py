"""How vLLM and vLLM-Omni name the modules of a checkpoint, without building a model.

vLLM renames the entries of a quantization config once (`entries`), then asks the config
about each module by the module's name in the engine (`modules`). Both renamings are
`WeightsMapper`s. For vLLM they are the architecture class's own. vLLM-Omni is not
installed beside the CPU build of vLLM, so its mappers are copied here as data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

OMNI = "Qwen3OmniMoeForConditionalGeneration"
NEVER_MATCHES = re.compile(r"(?!)")
EMBEDDING = re.compile(r"(embed_tokens|pos_embed|codec_embedding(\.\d+)?|code_embedding)$")
EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.\d+\.(gate|up|down)_proj$")


@dataclass(frozen=True)
class Stage:
    """One engine process: which checkpoint modules it builds and what it calls them."""

    title: str
    prefix: str
    """Checkpoint prefix of the modules this stage builds."""
    entries: WeightsMapper
    """Renames the entries of the quantization config."""
    modules: WeightsMapper
    """Renames checkpoint tensors to module parameters."""
    packed: dict[str, list[str]]
    """Fused module name to the checkpoint names it is made of."""
    unasked: re.Pattern[str]
    """Engine names of modules built without a quantization config: never FP4."""
    head: str | None = None
    """Engine name of the language model's head; "" where the engine gives it none."""

    def name(self, module: str) -> str | None:
        """The engine's unfused name of a checkpoint module; None if not in this stage."""
        if not module.startswith(self.prefix):
            return None
        renamed = self.modules.map_name(f"{module}.weight")
        return None if renamed is None else renamed.removesuffix(".weight")

    def fused(self, name: str) -> str:
        """The name of the module that vLLM builds from the unfused module `name`."""
        if expert := EXPERT.match(name):
            return expert["experts"]
        parent, _, leaf = name.rpartition(".")
        for fused, shards in self.packed.items():
            if leaf in shards and fused != leaf:
                return f"{parent}.{fused}" if parent else fused
        return name

    def is_head(self, module: str) -> bool:
        """Whether a checkpoint module is the head of the (thinker's) language model."""
        return module in ("lm_head", "thinker.lm_head")


def vllm_stage(architecture: str) -> Stage:
    """The one stage of plain vLLM, from the class that it registers for `architecture`."""
    model = ModelRegistry._try_load_model_cls(architecture)
    if model is None:
        raise ValueError(f"vLLM has no architecture {architecture}")
    mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    omni = architecture == OMNI
    return Stage(
        title="vllm",
        prefix="",
        entries=mapper.get_rename_mapper(),
        modules=replace(mapper, orig_to_new_stacked={}),
        packed=dict(getattr(model, "packed_modules_mapping", {})),
        unasked=re.compile(r"^audio_tower\.") if omni else NEVER_MATCHES,
        # The Qwen3-Omni thinker (seen in 0.26 to 0.33) builds its ParallelLMHead without a prefix.
        head="" if omni else None,
    )


def omni_stages(packed: dict[str, list[str]]) -> list[Stage]:
    """The stages of vLLM-Omni, for the releases whose renaming differs.

    Args:
        packed: the fused modules of the thinker class.

    Returns:
        Stages of 0.28 and later, where the outer class renames once, and of 0.26,
        where each stage's inner class renames although its modules have an outer prefix.
    """

    def renaming(**prefixes: str) -> WeightsMapper:
        return WeightsMapper(orig_to_new_prefix={key.replace("__", "."): new for key, new in prefixes.items()})

    outer = renaming(
        thinker__lm_head="thinker.language_model.lm_head",
        thinker__model="thinker.language_model.model",
        talker__model="talker.language_model.model",
    )
    inner = {
        "thinker": renaming(
            thinker__lm_head__="language_model.lm_head.",
            thinker__model__="language_model.model.",
            thinker__="",
        ),
        "talker": renaming(talker__model__="language_model.model.", talker__=""),
        "code2wav": renaming(code2wav__=""),
    }
    unasked = {
        "thinker": re.compile(r"^thinker\.(audio_tower|visual)\."),
        "talker": re.compile(r"^talker\.(?!language_model\.)|shared_expert_gate$"),
        "code2wav": re.compile(r"^code2wav\."),
    }
    stages = []
    for release, entries in (("0.28+", None), ("0.26", inner)):
        for part in inner:
            stages.append(
                Stage(
                    title=f"vllm-omni {release} {part}",
                    prefix=f"{part}.",
                    entries=entries[part] if entries else outer,
                    modules=outer,
                    packed=packed,
                    unasked=unasked[part],
                )
            )
    return stages


def stages_of(config: dict[str, Any]) -> list[Stage]:
    """Every stage that may load a checkpoint with this config.json."""
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise ValueError(f"architectures is {architectures}; it must name one class")
    plain = vllm_stage(architectures[0])
    omni = omni_stages(plain.packed) if architectures[0] == OMNI else []
    return [plain, *omni]
