"""``qwen3_moe``: Qwen3-30B-A3B and Qwen3-235B-A22B."""

from __future__ import annotations

from omnifp4.models.base import Config, Layout
from omnifp4.models.decoder import DecoderRules
from omnifp4.models.section import Schema
from omnifp4.models.text_model import text_layout

SCHEMA = Schema(
    "Qwen3MoeConfig",
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "mlp_only_layers": None,
    },
    {"num_experts": "num_local_experts"},
)
RULES = DecoderRules(experts=True)


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The whole model; see `text_layout`."""
    return text_layout("qwen3_moe", config, names, SCHEMA, RULES)
