"""``qwen3_vl_moe``: Qwen3-VL-30B-A3B and Qwen3-VL-235B-A22B.

The released checkpoints hold the experts of a layer in two 3-D tensors, each expert ``[in, out]``. Transformers 5 has
them ``[out, in]`` in memory and writes them so, and on reading turns around what has the other shape: both occur.
"""

from __future__ import annotations

from omnifp4.models.base import Config, Kind, Layout
from omnifp4.models.components import THINKER
from omnifp4.models.decoder import DecoderRules, add_decoder, add_head, read_decoder
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList
from omnifp4.models.vision_tower import VISION_DEFAULTS, MergerNames, add_qwen3_vision

TOP = Schema("Qwen3VLMoeConfig", {"tie_word_embeddings": False})
TEXT = Schema(
    "Qwen3VLMoeTextConfig",
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "mlp_only_layers": None,
    },
    {"num_experts": "num_local_experts"},
)
VISION = Schema("Qwen3VLMoeVisionConfig", VISION_DEFAULTS)
MERGERS = MergerNames("deepstack_merger_list", "norm", "linear_fc1", "linear_fc2")
RULES = DecoderRules(experts=True, fused_experts_transposed=True)


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The whole model. `names` settle whether a tied head is stored.

    Raises:
        ModelError: the config lacks or contradicts what the layout needs.
    """
    top = Section(config, TOP)
    text = top.section("text_config", TEXT)
    decoder = read_decoder(text, RULES)
    vocabulary = text.size("vocab_size")
    out = TensorList()
    add_qwen3_vision(out, "model.visual.", top.section("vision_config", VISION), MERGERS)
    embeddings = THINKER[Kind.EMBEDDINGS]
    out.tensor("model.language_model.embed_tokens.weight", (vocabulary, decoder.width), embeddings)
    add_decoder(out, "model.language_model.", decoder, THINKER)
    tied = top.flag("tie_word_embeddings")
    add_head(out, "lm_head", decoder.width, vocabulary, THINKER, tied=tied, names=names)
    return Layout("qwen3_vl_moe", tuple(out.tensors), tuple(out.fused), decoder.experts)
