"""Qwen2.5-Omni's vocoder: a diffusion transformer makes a mel spectrogram of codec tokens, BigVGAN a waveform of it."""

from __future__ import annotations

from omnifp4.models.components import CODE2WAV
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList

SCHEMA = Schema("Qwen2_5OmniToken2WavConfig")
DIT = Schema(
    "Qwen2_5OmniDiTConfig",
    {
        "hidden_size": 1024,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "ff_mult": 2,
        "emb_dim": 512,
        "head_dim": 64,
        "num_embeds": 8193,
        "mel_dim": 80,
        "enc_emb_dim": 192,
        "enc_dim": 128,
        "enc_channels": (256, 256, 256, 256, 768),
        "enc_kernel_sizes": (5, 3, 3, 3, 1),
        "enc_attention_channels": 64,
        "enc_res2net_scale": 2,
        "enc_se_channels": 64,
    },
)
BIGVGAN = Schema(
    "Qwen2_5OmniBigVGANConfig",
    {
        "mel_dim": 80,
        "upsample_initial_channel": 1536,
        "resblock_kernel_sizes": (3, 7, 11),
        "upsample_rates": (5, 3, 2, 2, 2, 2),
        "upsample_kernel_sizes": (11, 7, 4, 4, 4, 4),
    },
)
TIME_FEATURES = 256
"""Sinusoids that encode the diffusion time; the code fixes their number."""


def add_token2wav(out: TensorList, prefix: str, section: Section) -> None:
    """Both halves of the vocoder; `prefix` ends with a dot.

    Raises:
        ModelError: a key is missing, ill-typed or absurd, or lists that belong together differ in length.
    """
    _add_dit(out, f"{prefix}code2wav_dit_model.", section.section("dit_config", DIT))
    _add_bigvgan(out, f"{prefix}code2wav_bigvgan_model.", section.section("bigvgan_config", BIGVGAN))


def _add_dit(out: TensorList, prefix: str, section: Section) -> None:
    width, bands = section.size("hidden_size"), section.size("mel_dim")
    embedded, inner_width = section.size("emb_dim"), section.size("num_attention_heads") * section.size("head_dim")
    hidden = width * section.size("ff_mult", most=1024)
    out.linear(f"{prefix}time_embed.time_mlp.0", TIME_FEATURES, width, CODE2WAV, bias=True)
    out.linear(f"{prefix}time_embed.time_mlp.2", width, width, CODE2WAV, bias=True)
    out.tensor(f"{prefix}text_embed.codec_embed.weight", (section.size("num_embeds") + 1, embedded), CODE2WAV)
    inputs = bands + section.size("enc_dim") + section.size("enc_emb_dim") + embedded
    out.linear(f"{prefix}input_embed.proj", inputs, width, CODE2WAV, bias=True)
    _add_speaker_encoder(out, f"{prefix}input_embed.spk_encoder.", section)
    for layer in range(section.layers("num_hidden_layers")):
        name = f"{prefix}transformer_blocks.{layer}"
        out.linear(f"{name}.attn_norm.linear", width, 6 * width, CODE2WAV, bias=True)
        for part in ("q", "k", "v"):
            group = f"{name}.attn.qkv"
            out.linear(f"{name}.attn.to_{part}", width, inner_width, CODE2WAV, bias=True, scale_group=group)
        out.linear(f"{name}.attn.to_out.0", inner_width, width, CODE2WAV, bias=True)
        out.linear(f"{name}.ff.ff.0", width, hidden, CODE2WAV, bias=True)
        out.linear(f"{name}.ff.ff.3", hidden, width, CODE2WAV, bias=True)
    out.linear(f"{prefix}norm_out.linear", width, 2 * width, CODE2WAV, bias=True)
    out.linear(f"{prefix}proj_out", width, bands, CODE2WAV, bias=True)


def _add_speaker_encoder(out: TensorList, prefix: str, section: Section) -> None:
    """ECAPA-TDNN: convolutions over time, each block split into bands that feed one another."""
    channels, kernels = section.integers("enc_channels"), section.integers("enc_kernel_sizes")
    if len(channels) < 2 or len(kernels) != len(channels):
        raise section.refuse("enc_kernel_sizes", kernels, f"as long as enc_channels, {channels}, at least 2")
    scale, squeezed = section.size("enc_res2net_scale", most=1024), section.size("enc_se_channels")

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        out.conv(f"{prefix}{name}", (outputs, inputs, kernel), outputs, CODE2WAV)

    conv("blocks.0.conv", section.size("mel_dim"), channels[0], kernels[0])
    for index in range(1, len(channels) - 1):
        inputs, outputs = channels[index - 1], channels[index]
        if inputs < scale or outputs < scale:
            raise section.refuse("enc_res2net_scale", scale, f"at most the smallest of enc_channels, {channels}")
        conv(f"blocks.{index}.tdnn1.conv", inputs, outputs, 1)
        for band in range(scale - 1):
            name = f"blocks.{index}.res2net_block.blocks.{band}.conv"
            conv(name, outputs // scale, outputs // scale, kernels[index])
        conv(f"blocks.{index}.tdnn2.conv", outputs, outputs, 1)
        conv(f"blocks.{index}.se_block.conv1", outputs, squeezed, 1)
        conv(f"blocks.{index}.se_block.conv2", squeezed, outputs, 1)
    last, attention = channels[-1], section.size("enc_attention_channels")
    conv("mfa.conv", last, last, kernels[-1])
    conv("asp.tdnn.conv", 3 * last, attention, 1)
    conv("asp.conv", attention, last, 1)
    conv("fc", 2 * last, section.size("enc_dim"), 1)


def _add_bigvgan(out: TensorList, prefix: str, section: Section) -> None:
    channels = section.size("upsample_initial_channel")
    rates, widths = section.integers("upsample_rates"), section.integers("upsample_kernel_sizes")
    if len(rates) != len(widths):
        raise section.refuse("upsample_kernel_sizes", widths, f"as long as upsample_rates, {rates}")
    if not channels >> len(rates):
        raise section.refuse("upsample_initial_channel", channels, f"at least 2 ** {len(rates)}, halved at each rate")
    out.conv(f"{prefix}conv_pre", (channels, section.size("mel_dim"), 7), channels, CODE2WAV)
    for index, width in enumerate(widths):
        inner, outer = channels >> index, channels >> (index + 1)
        out.conv(f"{prefix}ups.{index}.0", (inner, outer, width), outer, CODE2WAV)
    kernels = section.integers("resblock_kernel_sizes")
    for index in range(len(rates)):
        outer = channels >> (index + 1)
        for number, kernel in enumerate(kernels):
            _add_resblock(out, f"{prefix}resblocks.{index * len(kernels) + number}", outer, kernel)
    last = channels >> len(rates)
    for parameter in ("alpha", "beta"):
        out.tensor(f"{prefix}activation_post.act.{parameter}", (last,), CODE2WAV)
    out.tensor(f"{prefix}conv_post.weight", (1, last, 7), CODE2WAV)


def _add_resblock(out: TensorList, name: str, channels: int, kernel: int) -> None:
    """Three pairs of convolutions, each behind a periodic activation."""
    for branch in ("convs1", "convs2"):
        for index in range(3):
            out.conv(f"{name}.{branch}.{index}", (channels, channels, kernel), channels, CODE2WAV)
    for index in range(6):
        for parameter in ("alpha", "beta"):
            out.tensor(f"{name}.activations.{index}.act.{parameter}", (channels,), CODE2WAV)
