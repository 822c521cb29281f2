"""The trained tiny omni: its config, its first weights, and experts computed in one matrix product for training."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from omnifp4.tiny import tiny_config
from omnifp4.tiny.weights import OUTLIER_DOUBLINGS, OUTLIER_SHARE

TAIL_FREEDOM = 5
"""Degrees of freedom of Student's t, from which linear weights start: trained weights have such tails."""
GAIN_CHANNELS = 4
GAIN = 6.0
"""Norm gains start at 1, and at this value in a few channels, the same ones in every layer."""

_CHANGES: dict[str, dict[str, Any]] = {
    "thinker_config.text_config": {"hidden_size": 256, "intermediate_size": 256},
    "thinker_config.audio_config": {
        "d_model": 128, "encoder_ffn_dim": 512, "encoder_layers": 3, "num_hidden_layers": 3, "output_dim": 256,
    },
    "thinker_config.vision_config": {
        "depth": 4, "hidden_size": 96, "num_heads": 3, "intermediate_size": 192, "out_hidden_size": 256,
        "deepstack_visual_indexes": [1, 2],
    },
    "talker_config": {"num_code_groups": 6, "thinker_hidden_size": 256},
    "talker_config.text_config": {"num_hidden_layers": 3},
    "talker_config.code_predictor_config": {
        "num_code_groups": 6, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3,
    },
    "code2wav_config": {
        "hidden_size": 128, "intermediate_size": 256, "decoder_dim": 192, "num_quantizers": 6, "codebook_dim": 128,
        "vector_quantization_hidden_dimension": 128,
    },
}  # fmt: skip


def trained_config() -> dict[str, Any]:
    """The config of the trained model: that of the random one with other widths and depths."""
    config: dict[str, Any] = copy.deepcopy(tiny_config())
    for path, changes in _CHANGES.items():
        section = config
        for key in path.split("."):
            section = section[key]
        section.update(changes)
    return config


def build(seed: int) -> Any:
    """A ``Qwen3OmniMoeForConditionalGeneration`` in float32 with its first weights."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)
    torch.manual_seed(seed)
    raw = trained_config()
    for section in (raw, raw["thinker_config"]):
        section["dtype"] = "float32"
    model = Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**raw)).float()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._experts_implementation = "all_experts"
            config._attn_implementation = "sdpa"
    start(model, seed)
    return model


def all_experts(experts: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by the router's choice: more arithmetic, no waiting for the choice.

    Args:
        experts: with ``gate_up_proj`` of shape ``(E, 2 I, H)`` and ``down_proj`` of ``(E, H, I)``.
        states: ``(tokens, H)``.
        chosen: ids of the chosen experts, ``(tokens, k)``.
        weights: of the chosen experts, ``(tokens, k)``.

    Returns:
        ``(tokens, H)``: what the stock implementations give, to rounding.
    """
    count, double, width = experts.gate_up_proj.shape
    share = torch.zeros(states.shape[0], count, dtype=weights.dtype, device=states.device)
    share = share.scatter(1, chosen, weights)
    inner = states @ experts.gate_up_proj.reshape(count * double, width).T.to(states.dtype)
    gate, up = inner.view(-1, count, double).chunk(2, dim=-1)
    inner = nn.functional.silu(gate) * up * share.unsqueeze(-1).to(gate.dtype)
    down = experts.down_proj.transpose(1, 2).reshape(count * double // 2, width)
    return inner.reshape(-1, count * double // 2) @ down.to(inner.dtype)


def start(model: Any, seed: int) -> None:
    """First weights of the decoders: heavy tails, outlier input channels, outlier norm gains.

    Training from Gaussian weights for minutes leaves them Gaussian; weights of models trained for months are not. So
    tails and outlier channels are there from the start, and training keeps what it has use for.
    """
    random = torch.Generator().manual_seed(seed)
    for root in (model.thinker.get_decoder(), model.talker.model, model.talker.code_predictor.model):
        layers = len(root.layers)
        for name, parameter in root.named_parameters():
            leaf = name.rsplit(".", 2)[-2]
            with torch.no_grad():
                if parameter.ndim == 1:
                    if leaf in ("input_layernorm", "post_attention_layernorm", "norm"):
                        parameter[:GAIN_CHANNELS] = GAIN
                elif "embed" in name:
                    parameter.normal_(0.0, 0.1, generator=random)
                else:
                    out = name.endswith(("down_proj", "down_proj.weight", "o_proj.weight"))
                    scale = 0.5 / math.sqrt(parameter.shape[-1]) / (math.sqrt(2 * layers) if out else 1.0)
                    parameter.copy_(heavy(parameter.shape, random) * scale)
                    if leaf != "gate":
                        width = parameter.shape[-1]
                        channels = torch.randperm(width, generator=random)[: max(1, round(width * OUTLIER_SHARE))]
                        parameter[..., channels] *= 2.0**OUTLIER_DOUBLINGS


def heavy(shape: torch.Size, random: torch.Generator) -> Tensor:
    """Student's t with `TAIL_FREEDOM` degrees of freedom, scaled to unit variance."""
    normal = torch.randn(shape, generator=random)
    chi = sum(torch.randn(shape, generator=random) ** 2 for _ in range(TAIL_FREEDOM))
    return normal / torch.sqrt(chi / TAIL_FREEDOM) * math.sqrt((TAIL_FREEDOM - 2) / TAIL_FREEDOM)  # type: ignore[operator]


def groups(module: Any, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: decay for matrices; none for gains, biases and embeddings, so that outliers may grow."""
    wide, narrow = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (wide if parameter.ndim > 1 and "embed" not in name else narrow).append(parameter)
    return [{"params": wide, "weight_decay": decay}, {"params": narrow, "weight_decay": 0.0}]
