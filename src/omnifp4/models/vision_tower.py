"""The vision encoder of the third Qwen generation: one for Qwen3-Omni and Qwen3-VL, under different merger names."""

from __future__ import annotations

from dataclasses import dataclass

from omnifp4.models.components import VISION_TOWER
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList

VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}


@dataclass(frozen=True, slots=True)
class MergerNames:
    """How a model type names the modules that join patches for the text decoder."""

    deepstack: str
    norm: str
    first: str
    second: str


QWEN3_OMNI_VISION = Schema("Qwen3OmniMoeVisionEncoderConfig", VISION_DEFAULTS)
QWEN3_OMNI_MERGERS = MergerNames("merger_list", "ln_q", "mlp.0", "mlp.2")


def add_qwen3_vision(out: TensorList, prefix: str, section: Section, mergers: MergerNames) -> None:
    """The vision tower with its merger and one more merger for each deepstack layer; `prefix` ends with a dot."""
    width, inner_width = section.size("hidden_size"), section.size("intermediate_size")
    patch = section.size("patch_size")
    kernel = (width, section.size("in_channels"), section.size("temporal_patch_size"), patch, patch)
    out.conv(f"{prefix}patch_embed.proj", kernel, width, VISION_TOWER)
    out.tensor(f"{prefix}pos_embed.weight", (section.size("num_position_embeddings"), width), VISION_TOWER)
    for layer in range(section.layers("depth")):
        name = f"{prefix}blocks.{layer}"
        out.norm(f"{name}.norm1", width, VISION_TOWER, bias=True)
        out.linear(f"{name}.attn.qkv", width, 3 * width, VISION_TOWER, bias=True)
        out.linear(f"{name}.attn.proj", width, width, VISION_TOWER, bias=True)
        out.norm(f"{name}.norm2", width, VISION_TOWER, bias=True)
        out.linear(f"{name}.mlp.linear_fc1", width, inner_width, VISION_TOWER, bias=True)
        out.linear(f"{name}.mlp.linear_fc2", inner_width, width, VISION_TOWER, bias=True)
    merged = width * section.size("spatial_merge_size") ** 2
    deepstack = len(section.integers("deepstack_visual_indexes", least=0))
    modules = [("merger", width), *((f"{mergers.deepstack}.{index}", merged) for index in range(deepstack))]
    for module, norm_width in modules:
        out.norm(f"{prefix}{module}.{mergers.norm}", norm_width, VISION_TOWER, bias=True)
        out.linear(f"{prefix}{module}.{mergers.first}", merged, merged, VISION_TOWER, bias=True)
        out.linear(
            f"{prefix}{module}.{mergers.second}", merged, section.size("out_hidden_size"), VISION_TOWER, bias=True
        )
