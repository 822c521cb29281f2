"""How vLLM and vLLM-Omni name the linears of a Qwen3-Omni, and how they match ``ignore``: a model of their code.

Read in vLLM 0.26 to 0.32 and vLLM-Omni 0.28 to 0.30. Modules get new first parts, q/k/v and gate/up are one linear, and
all experts of a layer are one module. Tests of interoperability ask the engines themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

VLLM = {"thinker.lm_head.": "language_model.lm_head.", "thinker.model.": "language_model.model.", "thinker.": ""}
VLLM_OMNI = {
    "thinker.lm_head": "thinker.language_model.lm_head",
    "thinker.model": "thinker.language_model.model",
    "talker.model": "talker.language_model.model",
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def renamed(name: str, mapper: Mapping[str, str]) -> str:
    for old, new in mapper.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def engine_module(module: str, mapper: Mapping[str, str]) -> str:
    """The engine's module that holds a checkpoint's linear."""
    name = renamed(module, mapper)
    if match := re.fullmatch(r"(.*\.experts)\.\d+\.\w+", name):
        return match[1]
    for fused, shards in FUSED.items():
        parent, _, last = name.rpartition(".")
        if last in shards and "visual" not in name and "code_predictor" not in name:
            return f"{parent}.{fused}"
    return name


def shards_of(name: str) -> list[str]:
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{shard}" for shard in FUSED.get(last, ())] or [name]


def modelopt_excludes(name: str, ignore: Sequence[str], mapper: Mapping[str, str]) -> bool:
    """``ModelOptQuantConfigBase.is_layer_excluded`` after ``apply_vllm_mapper``."""
    expanded: list[str] = []
    for entry in ignore:
        if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
            expanded += [entry[:-1], entry[:-1] + ".*"]
        else:
            expanded.append(entry)
    entries = [renamed(entry, mapper) for entry in expanded]
    if "experts" in name:
        if any(name in entry for entry in entries if "experts" in entry):
            return True
    else:
        found = {shard in entries for shard in shards_of(name)}
        if len(found) > 1:
            raise ValueError(f"{name}: some but not all shards are quantized")
        if found == {True}:
            return True
    return any(
        entry in name or entry in name.removeprefix("language_model.") or fnmatchcase(name, entry) for entry in entries
    )


def compressed_tensors_excludes(name: str, ignore: Sequence[str], mapper: Mapping[str, str]) -> bool:
    """``should_ignore_layer``: exact names are mapped, expressions are not; a layer's first expert speaks for all."""
    entries = [entry if entry.startswith("re:") or "." not in entry else renamed(entry, mapper) for entry in ignore]
    if name.endswith(".experts"):
        names: Iterable[str] = [f"{name}.0.{projection}" for projection in ("gate_proj", "up_proj", "down_proj")]
    else:
        names = shards_of(name)
    found = {
        any(re.match(entry[3:], shard) if entry.startswith("re:") else entry == shard for entry in entries)
        for shard in names
    }
    if len(found) > 1:
        raise ValueError(f"{name}: some but not all shards are quantized")
    return found == {True}
