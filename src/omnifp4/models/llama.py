"""``llama``: Llama 1 to 3 and the many models of that shape."""

from __future__ import annotations

from omnifp4.models.base import Config, Layout
from omnifp4.models.decoder import DecoderRules
from omnifp4.models.section import Schema
from omnifp4.models.text_model import text_layout

SCHEMA = Schema(
    "LlamaConfig",
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
)
RULES = DecoderRules(mlp_bias=True, qk_norm=False)


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The whole model; see `text_layout`."""
    return text_layout("llama", config, names, SCHEMA, RULES)
