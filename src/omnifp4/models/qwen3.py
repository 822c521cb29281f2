"""``qwen3``: the dense Qwen3 models, from 0.6B to 32B."""

from __future__ import annotations

from omnifp4.models.base import Config, Layout
from omnifp4.models.decoder import DecoderRules
from omnifp4.models.section import Schema
from omnifp4.models.text_model import text_layout

SCHEMA = Schema(
    "Qwen3Config",
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
)
RULES = DecoderRules()


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The whole model; see `text_layout`."""
    return text_layout("qwen3", config, names, SCHEMA, RULES)
