"""Qwen3-Omni's vocoder: codec codes through a small transformer and growing convolutions to a waveform."""

from __future__ import annotations

from omnifp4.models.components import CODE2WAV, CODE2WAV_PALETTE
from omnifp4.models.decoder import DecoderRules, add_decoder_layer, read_decoder
from omnifp4.models.section import Schema, Section
from omnifp4.models.tensors import TensorList

SCHEMA = Schema(
    "Qwen3OmniMoeCode2WavConfig",
    {
        "codebook_size": 2048,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "attention_bias": False,
        "intermediate_size": 3072,
        "hidden_act": "silu",
        "num_hidden_layers": 8,
        "num_quantizers": 16,
        "upsample_rates": (8, 5, 4, 3),
        "upsampling_ratios": (2, 2),
        "decoder_dim": 1536,
    },
)
RULES = DecoderRules(qk_norm=False)


def add_code2wav(out: TensorList, prefix: str, section: Section) -> None:
    """The whole vocoder; `prefix` ends with a dot.

    Raises:
        ModelError: also where ``decoder_dim`` is too small to be halved at each upsampling.
    """
    decoder = read_decoder(section, RULES)
    width = decoder.width
    codes = section.size("codebook_size") * section.size("num_quantizers")
    out.tensor(f"{prefix}code_embedding.weight", (codes, width), CODE2WAV)
    for layer in range(decoder.layers):
        name = f"{prefix}pre_transformer.layers.{layer}"
        add_decoder_layer(out, name, decoder, CODE2WAV_PALETTE, sparse=False)
        out.tensor(f"{name}.self_attn_layer_scale.scale", (width,), CODE2WAV)
        out.tensor(f"{name}.mlp_layer_scale.scale", (width,), CODE2WAV)
    out.norm(f"{prefix}pre_transformer.norm", width, CODE2WAV)
    for index, factor in enumerate(section.integers("upsampling_ratios")):
        _add_upsampling(out, f"{prefix}upsample.{index}", width, factor)
    _add_wave_decoder(out, f"{prefix}decoder", section, width)


def _add_upsampling(out: TensorList, name: str, width: int, factor: int) -> None:
    """A transposed convolution and a ConvNeXt block."""
    out.conv(f"{name}.0.conv", (width, width, factor), width, CODE2WAV)
    out.conv(f"{name}.1.dwconv.conv", (width, 1, 7), width, CODE2WAV)
    out.norm(f"{name}.1.norm", width, CODE2WAV, bias=True)
    out.linear(f"{name}.1.pwconv1", width, 4 * width, CODE2WAV, bias=True)
    out.linear(f"{name}.1.pwconv2", 4 * width, width, CODE2WAV, bias=True)
    out.tensor(f"{name}.1.gamma", (width,), CODE2WAV)


def _add_wave_decoder(out: TensorList, name: str, section: Section, width: int) -> None:
    """Blocks that halve the channels and stretch the time, down to one channel."""
    rates = section.integers("upsample_rates")
    channels = section.size("decoder_dim")
    if not channels >> len(rates):
        raise section.refuse("decoder_dim", channels, f"at least 2 ** {len(rates)}, one halving for each upsample rate")
    out.conv(f"{name}.0.conv", (channels, width, 7), channels, CODE2WAV)
    for index, rate in enumerate(rates):
        # Halving from the top each time is what the model does; it matters where the width is odd.
        inner, outer = channels >> index, channels >> (index + 1)
        block = f"{name}.{index + 1}.block"
        _add_snake(out, f"{block}.0", inner)
        out.conv(f"{block}.1.conv", (inner, outer, 2 * rate), outer, CODE2WAV)
        for unit in (2, 3, 4):
            _add_snake(out, f"{block}.{unit}.act1", outer)
            out.conv(f"{block}.{unit}.conv1.conv", (outer, outer, 7), outer, CODE2WAV)
            _add_snake(out, f"{block}.{unit}.act2", outer)
            out.conv(f"{block}.{unit}.conv2.conv", (outer, outer, 1), outer, CODE2WAV)
    last = channels >> len(rates)
    _add_snake(out, f"{name}.{len(rates) + 1}", last)
    out.conv(f"{name}.{len(rates) + 2}.conv", (1, last, 7), 1, CODE2WAV)


def _add_snake(out: TensorList, name: str, channels: int) -> None:
    """The periodic activation, with a frequency and a magnitude for each channel."""
    out.tensor(f"{name}.alpha", (channels,), CODE2WAV)
    out.tensor(f"{name}.beta", (channels,), CODE2WAV)
