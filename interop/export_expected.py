"""Writes the artifacts and the values that the peers' libraries must find in them.

    python export_expected.py FOLDER

Runs in this project's environment. For the tiny omni model and a small Qwen3-MoE, for each dialect and scale rule, FOLDER gets
an artifact and beside it ``NAME.expected.safetensors``: every dequantized weight in BF16, by our own reference. One more for each
dialect, ``omni.DIALECT.mixed.sweep``, has components in the other schemes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from omnifp4 import quantize
from omnifp4.checkpoint.artifact import find_coded, find_linears
from omnifp4.checkpoint.dialects import StoredTensor
from omnifp4.checkpoint.dialects.coded import codes_from_disk, scale_from_disk
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.output import OutputWriter, plan_output
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.formats import coded
from omnifp4.formats.nvfp4 import E2M1_VALUES, E4M3_VALUES, unpack
from omnifp4.formats.reference import blocks_of, round_to_bf16
from omnifp4.tiny import write_random_checkpoint, write_tiny_omni

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "intermediate_size": 256, "vocab_size": 512, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "attention_bias": False, "norm_topk_prob": True, "max_position_embeddings": 2048, "rope_theta": 1e6,
    "dtype": "bfloat16",
}  # fmt: skip


def write_expected(artifact: Path) -> None:
    """Decode every FP4 linear of an artifact as its dialect says: factor or divisor, one float32 rounding each."""
    checkpoint = open_checkpoint(artifact)
    values: dict[str, np.ndarray] = {}
    with CheckpointReader(checkpoint) as reader:
        for module, linear in find_linears(checkpoint.tensors).items():
            assert linear.block_scale is not None and linear.tensor_scale is not None
            packed = reader.read(linear.packed).view(np.uint8)
            block_scale = E4M3_VALUES[reader.read(linear.block_scale).view(np.uint8)]
            tensor_scale = np.float32(reader.read(linear.tensor_scale).reshape(-1)[0])
            scale = block_scale / tensor_scale if linear.reciprocal else block_scale * tensor_scale
            decoded = blocks_of(E2M1_VALUES[unpack(packed)]) * scale[..., None]
            values[f"{module}.weight"] = round_to_bf16(decoded.astype(np.float32).reshape(packed.shape[0], -1))
        for module, other in find_coded(checkpoint.tensors).items():
            assert other.scale is not None
            raw = reader.read(other.codes).reshape(-1).view(np.uint8).reshape(other.shape[0], -1)
            scale = scale_from_disk(reader.read(other.scale), other.scale.dtype)
            stored = coded.CodedTensor(other.scheme, codes_from_disk(raw, other.codes.dtype), scale)
            values[f"{module}.weight"] = round_to_bf16(coded.decode(stored))
    target = artifact.with_name(artifact.name + ".expected.safetensors")
    planned = plan_output([[StoredTensor(name, "BF16", bits.shape)] for name, bits in values.items()])
    with OutputWriter(artifact.parent, planned) as writer:
        for name, bits in values.items():
            writer.write(name, bits)
    (artifact.parent / planned.shards[0].file_name).rename(target)


MIXED = {
    "modelopt": ["thinker.attention=fp8", "talker.attention=fp8", "talker.experts=mxfp4"],
    "compressed-tensors": ["thinker.attention=int8", "talker.attention=fp8", "talker.experts=mxfp4", "talker.shared_experts=int8"],
}  # fmt: skip


def main() -> None:
    home = Path(sys.argv[1])
    write_tiny_omni(home / "omni", random_weights=True)
    write_random_checkpoint(MOE, home / "moe", seed=0)
    for model in ("omni", "moe"):
        for dialect in ("modelopt", "compressed-tensors"):
            for rule in ("sweep", "max", "four-over-six"):
                artifact = home / f"{model}.{dialect}.{rule}"
                quantize(home / model, artifact, format=dialect, rule=rule, recipe="nvfp4-thinker-talker")
                write_expected(artifact)
                print(artifact.name, flush=True)
    for dialect, components in MIXED.items():
        artifact = home / f"omni.{dialect}.mixed.sweep"
        quantize(home / "omni", artifact, format=dialect, components=components)
        write_expected(artifact)
        print(artifact.name, flush=True)


if __name__ == "__main__":
    main()
