"""``qwen3_omni_moe``: Qwen3-Omni-30B-A3B Instruct, Thinking and Captioner, and the thinker saved alone."""

from __future__ import annotations

from omnifp4.models.audio_tower import QWEN3_OMNI_AUDIO, add_qwen3_omni_audio
from omnifp4.models.base import Config, Kind, Layout
from omnifp4.models.components import CODE_PREDICTOR, TALKER, THINKER
from omnifp4.models.decoder import Decoder, DecoderRules, add_decoder, add_head, read_decoder
from omnifp4.models.qwen3_omni_code2wav import SCHEMA as CODE2WAV
from omnifp4.models.qwen3_omni_code2wav import add_code2wav
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList
from omnifp4.models.vision_tower import QWEN3_OMNI_MERGERS, QWEN3_OMNI_VISION, add_qwen3_vision

TOP = Schema("Qwen3OmniMoeConfig", {"enable_audio_output": True})
THINKER_TOP = Schema("Qwen3OmniMoeThinkerConfig", {"tie_word_embeddings": False})
THINKER_TEXT = Schema(
    "Qwen3OmniMoeTextConfig",
    {
        "vocab_size": 3584,
        "hidden_size": 2048,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "mlp_only_layers": None,
    },
)
TALKER_TOP = Schema("Qwen3OmniMoeTalkerConfig", {"thinker_hidden_size": 2048, "tie_word_embeddings": False})
TALKER_TEXT = Schema(
    "Qwen3OmniMoeTalkerTextConfig",
    {
        "vocab_size": 3072,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_intermediate_size": 384,
        "num_experts": 128,
    },
    # Transformers 5 writes this second name for the talker, and the first for the thinker.
    {"num_experts": "num_local_experts"},
)
PREDICTOR = Schema(
    "Qwen3OmniMoeTalkerCodePredictorConfig",
    {
        "vocab_size": 2048,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "num_code_groups": 32,
    },
)

THINKER_RULES = DecoderRules(experts=True)
TALKER_RULES = DecoderRules(experts=True, always_sparse=True, shared_expert=True)
PREDICTOR_RULES = DecoderRules()


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The whole model. `names` settle whether a tied head is stored, and whether speech is there against the config.

    Raises:
        ModelError: the config lacks or contradicts what the layout needs.
    """
    top = Section(config, TOP)
    out = TensorList()
    decoder = _add_thinker(out, "thinker.", top.section("thinker_config", THINKER_TOP), names)
    talker = top.optional_section("talker_config", TALKER_TOP)
    notes: tuple[str, ...] = ()
    if talker is None or not (top.flag("enable_audio_output") or any(name.startswith("talker.") for name in names)):
        notes = ("no speech: the config has no talker, or enable_audio_output is false",)
    else:
        _add_talker(out, talker, names)
        # A config class without a model_type: Transformers leaves the section out where all of it is default.
        code2wav = top.optional_section("code2wav_config", CODE2WAV) or Section({}, CODE2WAV, "code2wav_config")
        add_code2wav(out, "code2wav.", code2wav)
    return Layout("qwen3_omni_moe", tuple(out.tensors), tuple(out.fused), decoder.experts, notes)


def thinker_layout(config: Config, names: frozenset[str]) -> Layout:
    """The thinker saved alone (``qwen3_omni_moe_thinker``), with or without the prefix ``thinker.``: `names` say.

    Transformers writes no prefix unless the weights were read from a whole checkpoint.
    """
    prefix = "thinker." if any(name.startswith("thinker.") for name in names) else ""
    out = TensorList()
    decoder = _add_thinker(out, prefix, Section(config, THINKER_TOP), names)
    return Layout("qwen3_omni_moe_thinker", tuple(out.tensors), tuple(out.fused), decoder.experts)


def _add_thinker(out: TensorList, prefix: str, section: Section, names: frozenset[str]) -> Decoder:
    text = section.section("text_config", THINKER_TEXT)
    decoder = read_decoder(text, THINKER_RULES)
    vocabulary = text.size("vocab_size")
    add_qwen3_omni_audio(out, f"{prefix}audio_tower.", section.section("audio_config", QWEN3_OMNI_AUDIO))
    add_qwen3_vision(out, f"{prefix}visual.", section.section("vision_config", QWEN3_OMNI_VISION), QWEN3_OMNI_MERGERS)
    embeddings = THINKER[Kind.EMBEDDINGS]
    out.tensor(f"{prefix}model.embed_tokens.weight", (vocabulary, decoder.width), embeddings)
    add_decoder(out, f"{prefix}model.", decoder, THINKER)
    tied = section.flag("tie_word_embeddings")
    add_head(out, f"{prefix}lm_head", decoder.width, vocabulary, THINKER, tied=tied, names=names)
    return decoder


def _add_talker(out: TensorList, section: Section, names: frozenset[str]) -> None:
    text = section.section("text_config", TALKER_TEXT)
    decoder = read_decoder(text, TALKER_RULES)
    vocabulary, inner_width = text.size("vocab_size"), text.size("intermediate_size")
    for module in ("talker.text_projection", "talker.hidden_projection"):
        component = TALKER[Kind.PROJECTIONS]
        out.linear(f"{module}.linear_fc1", section.size("thinker_hidden_size"), inner_width, component, bias=True)
        out.linear(f"{module}.linear_fc2", inner_width, decoder.width, component, bias=True)
    out.tensor("talker.model.codec_embedding.weight", (vocabulary, decoder.width), TALKER[Kind.EMBEDDINGS])
    add_decoder(out, "talker.model.", decoder, TALKER)
    tied = section.flag("tie_word_embeddings")
    add_head(out, "talker.codec_head", decoder.width, vocabulary, TALKER, tied=tied, names=names)
    _add_code_predictor(out, "talker.code_predictor.", section.section("code_predictor_config", PREDICTOR))


def _add_code_predictor(out: TensorList, prefix: str, section: Section) -> None:
    """A dense decoder with an embedding table and a head for each codec group but the first."""
    decoder = read_decoder(section, PREDICTOR_RULES)
    vocabulary = section.size("vocab_size")
    groups = section.layers("num_code_groups") - 1
    component = CODE_PREDICTOR[Kind.WEIGHTS]
    for group in range(groups):
        out.tensor(f"{prefix}model.codec_embedding.{group}.weight", (vocabulary, decoder.width), component)
    add_decoder(out, f"{prefix}model.", decoder, CODE_PREDICTOR)
    for group in range(groups):
        out.linear(f"{prefix}lm_head.{group}", decoder.width, vocabulary, component)
