"""``qwen2_5_omni``: Qwen2.5-Omni 3B and 7B, dense throughout."""

from __future__ import annotations

from omnifp4.models.audio_tower import AUDIO_ALIASES, add_whisper_layers
from omnifp4.models.base import Config, Kind, Layout
from omnifp4.models.components import AUDIO_TOWER, TALKER, THINKER, VISION_TOWER
from omnifp4.models.decoder import DecoderRules, add_decoder, add_head, read_decoder
from omnifp4.models.qwen2_5_token2wav import SCHEMA as TOKEN2WAV
from omnifp4.models.qwen2_5_token2wav import add_token2wav
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList

TOP = Schema("Qwen2_5OmniConfig", {"enable_audio_output": True})
THINKER_TOP = Schema("Qwen2_5OmniThinkerConfig", {"tie_word_embeddings": False})
TEXT = Schema(
    "Qwen2_5OmniTextConfig",
    {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
    },
)
TALKER_TEXT = Schema(
    "Qwen2_5OmniTalkerConfig",
    {
        "vocab_size": 8448,
        "embedding_size": 3584,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "hidden_act": "silu",
    },
)
AUDIO = Schema(
    "Qwen2_5OmniAudioEncoderConfig",
    {
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "output_dim": 3584,
    },
    AUDIO_ALIASES,
)
VISION = Schema(
    "Qwen2_5OmniVisionEncoderConfig",
    {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
    },
)
RULES = DecoderRules(qkv_bias=True, output_bias=False, qk_norm=False)


def layout(config: Config, names: frozenset[str]) -> Layout:
    """The whole model. `names` settle whether a tied head is stored, and whether speech is there against the config.

    Raises:
        ModelError: the config lacks or contradicts what the layout needs.
    """
    top = Section(config, TOP)
    out = TensorList()
    _add_thinker(out, "thinker.", top.section("thinker_config", THINKER_TOP), names)
    talker = top.optional_section("talker_config", TALKER_TEXT)
    notes: tuple[str, ...] = ()
    if talker is None or not (top.flag("enable_audio_output") or any(name.startswith("talker.") for name in names)):
        notes = ("no speech: the config has no talker, or enable_audio_output is false",)
    else:
        _add_talker(out, "talker.", talker)
        add_token2wav(out, "token2wav.", top.section("token2wav_config", TOKEN2WAV))
    return Layout("qwen2_5_omni", tuple(out.tensors), notes=notes)


def _add_thinker(out: TensorList, prefix: str, section: Section, names: frozenset[str]) -> None:
    text = section.section("text_config", TEXT)
    decoder = read_decoder(text, RULES)
    vocabulary = text.size("vocab_size")
    _add_audio(out, f"{prefix}audio_tower.", section.section("audio_config", AUDIO))
    _add_vision(out, f"{prefix}visual.", section.section("vision_config", VISION))
    embeddings = THINKER[Kind.EMBEDDINGS]
    out.tensor(f"{prefix}model.embed_tokens.weight", (vocabulary, decoder.width), embeddings)
    add_decoder(out, f"{prefix}model.", decoder, THINKER)
    tied = section.flag("tie_word_embeddings")
    add_head(out, f"{prefix}lm_head", decoder.width, vocabulary, THINKER, tied=tied, names=names)


def _add_talker(out: TensorList, prefix: str, section: Section) -> None:
    """The talker: its embeddings have the thinker's width, and one projection brings both to its own."""
    decoder = read_decoder(section, RULES)
    vocabulary, embedded = section.size("vocab_size"), section.size("embedding_size")
    out.tensor(f"{prefix}model.embed_tokens.weight", (vocabulary, embedded), TALKER[Kind.EMBEDDINGS])
    out.linear(f"{prefix}thinker_to_talker_proj", embedded, decoder.width, TALKER[Kind.PROJECTIONS], bias=True)
    add_decoder(out, f"{prefix}model.", decoder, TALKER)
    out.linear(f"{prefix}codec_head", decoder.width, vocabulary, TALKER[Kind.HEAD])


def _add_audio(out: TensorList, prefix: str, section: Section) -> None:
    """Whisper's encoder, whose key projections have no bias, with two learned marks for begin and end."""
    width = section.size("d_model")
    out.conv(f"{prefix}conv1", (width, section.size("num_mel_bins"), 3), width, AUDIO_TOWER)
    out.conv(f"{prefix}conv2", (width, width, 3), width, AUDIO_TOWER)
    output_width = section.size("output_dim")
    out.tensor(f"{prefix}audio_bos_eos_token.weight", (2, output_width), AUDIO_TOWER)
    add_whisper_layers(out, prefix, section, key_bias=False)
    out.linear(f"{prefix}proj", width, output_width, AUDIO_TOWER, bias=True)


def _add_vision(out: TensorList, prefix: str, section: Section) -> None:
    """A vision tower with RMS norms, separate q, k and v, and gated MLPs with biases."""
    width, inner_width = section.size("hidden_size"), section.size("intermediate_size")
    patch = section.size("patch_size")
    kernel = (width, section.size("in_channels"), section.size("temporal_patch_size"), patch, patch)
    out.tensor(f"{prefix}patch_embed.proj.weight", kernel, VISION_TOWER)
    for layer in range(section.layers("depth")):
        name = f"{prefix}blocks.{layer}"
        out.norm(f"{name}.norm1", width, VISION_TOWER)
        for part in ("q", "k", "v"):
            out.linear(f"{name}.attn.{part}", width, width, VISION_TOWER, bias=True, scale_group=f"{name}.attn.qkv")
        out.linear(f"{name}.attn.proj", width, width, VISION_TOWER, bias=True)
        out.norm(f"{name}.norm2", width, VISION_TOWER)
        out.gated_mlp(f"{name}.mlp", width, inner_width, VISION_TOWER, bias=True)
    merged = width * section.size("spatial_merge_size") ** 2
    out.norm(f"{prefix}merger.ln_q", width, VISION_TOWER)
    out.linear(f"{prefix}merger.mlp.0", merged, merged, VISION_TOWER, bias=True)
    out.linear(f"{prefix}merger.mlp.2", merged, section.size("out_hidden_size"), VISION_TOWER, bias=True)
