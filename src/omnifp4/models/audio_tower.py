"""The audio encoders of the Qwen omni models: Whisper's layers behind convolutions over a mel spectrogram."""

from __future__ import annotations

from omnifp4.models.components import AUDIO_TOWER
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList

AUDIO_ALIASES = {
    "encoder_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}

QWEN3_OMNI_AUDIO = Schema(
    "Qwen3OmniMoeAudioEncoderConfig",
    {
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "output_dim": 3584,
        "downsample_hidden_size": 480,
    },
    AUDIO_ALIASES,
)


def add_qwen3_omni_audio(out: TensorList, prefix: str, section: Section) -> None:
    """The audio tower of Qwen3-Omni: three convolutions that each halve the mel bands and the time, then Whisper.

    `prefix` ends with a dot.
    """
    width = section.size("d_model")
    channels = section.size("downsample_hidden_size")
    bands = section.size("num_mel_bins")
    for _ in range(3):
        bands = (bands + 1) // 2
    for number, inputs in ((1, 1), (2, channels), (3, channels)):
        out.conv(f"{prefix}conv2d{number}", (channels, inputs, 3, 3), channels, AUDIO_TOWER)
    out.linear(f"{prefix}conv_out", channels * bands, width, AUDIO_TOWER)
    add_whisper_layers(out, prefix, section, key_bias=True)
    out.linear(f"{prefix}proj1", width, width, AUDIO_TOWER, bias=True)
    out.linear(f"{prefix}proj2", width, section.size("output_dim"), AUDIO_TOWER, bias=True)


def add_whisper_layers(out: TensorList, prefix: str, section: Section, *, key_bias: bool) -> None:
    """The transformer layers and the norm after them; `key_bias`: the key projection has a bias."""
    width, inner_width = section.size("d_model"), section.size("encoder_ffn_dim")
    for layer in range(section.layers("encoder_layers")):
        name = f"{prefix}layers.{layer}"
        attention = f"{name}.self_attn"
        out.norm(f"{name}.self_attn_layer_norm", width, AUDIO_TOWER, bias=True)
        for part, bias in (("q", True), ("k", key_bias), ("v", True)):
            out.linear(f"{attention}.{part}_proj", width, width, AUDIO_TOWER, bias=bias, scale_group=f"{attention}.qkv")
        out.linear(f"{attention}.out_proj", width, width, AUDIO_TOWER, bias=True)
        out.norm(f"{name}.final_layer_norm", width, AUDIO_TOWER, bias=True)
        out.linear(f"{name}.fc1", width, inner_width, AUDIO_TOWER, bias=True)
        out.linear(f"{name}.fc2", inner_width, width, AUDIO_TOWER, bias=True)
    out.norm(f"{prefix}ln_post", width, AUDIO_TOWER, bias=True)
