"""Configs of tiny models, and variants of them. Every width differs, so that a swapped dimension cannot hide."""

from __future__ import annotations

import copy
from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MOE_TEXT = TEXT | {"head_dim": 10, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 12,
    "intermediate_size": 28,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "patch_size": 4,
}
AUDIO: dict[str, Any] = {
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 26,
    "d_model": 18,
    "output_dim": 32,
    "num_mel_bins": 19,
}

QWEN3_OMNI: dict[str, Any] = {
    "model_type": "qwen3_omni_moe",
    "thinker_config": {
        "text_config": MOE_TEXT,
        "vision_config": VISION,
        "audio_config": AUDIO | {"downsample_hidden_size": 8},
        "vision_start_token_id": 1,
        "vision_end_token_id": 2,
    },
    "talker_config": {
        "text_config": MOE_TEXT | {"vocab_size": 50, "hidden_size": 36, "shared_expert_intermediate_size": 22},
        "code_predictor_config": {
            "vocab_size": 17,
            "hidden_size": 36,
            "intermediate_size": 23,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "num_code_groups": 4,
        },
        "thinker_hidden_size": 32,
        "num_code_groups": 4,
        "spatial_merge_size": 2,
        "vision_start_token_id": 1,
    },
    "code2wav_config": {
        "codebook_size": 17,
        "hidden_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 21,
        "num_hidden_layers": 2,
        "num_quantizers": 4,
        "decoder_dim": 37,
        "upsample_rates": [3, 2],
        "upsampling_ratios": [2, 3],
    },
}
QWEN2_5_OMNI: dict[str, Any] = {
    "model_type": "qwen2_5_omni",
    "thinker_config": {
        "text_config": TEXT,
        "vision_config": {
            "depth": 2,
            "hidden_size": 12,
            "intermediate_size": 28,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
        },
        "audio_config": AUDIO,
    },
    "talker_config": TEXT | {"hidden_size": 36, "embedding_size": 32, "head_dim": 10},
    "token2wav_config": {
        "dit_config": {
            "hidden_size": 22,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 8,
            "ff_mult": 3,
            "emb_dim": 12,
            "num_embeds": 20,
            "mel_dim": 10,
            "enc_emb_dim": 9,
            "enc_dim": 7,
            "enc_channels": [8, 8, 16, 11],
            "enc_kernel_sizes": [5, 3, 3, 1],
            "enc_dilations": [1, 2, 3, 1],
            "enc_attention_channels": 6,
            "enc_res2net_scale": 4,
            "enc_se_channels": 5,
            "look_ahead_layers": [0],
            "look_backward_layers": [1],
        },
        "bigvgan_config": {
            "mel_dim": 10,
            "upsample_initial_channel": 35,
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
            "upsample_rates": [3, 2],
            "upsample_kernel_sizes": [7, 4],
        },
    },
}
QWEN3_VL_MOE: dict[str, Any] = {"model_type": "qwen3_vl_moe", "text_config": MOE_TEXT, "vision_config": VISION}
QWEN3_MOE: dict[str, Any] = {"model_type": "qwen3_moe"} | MOE_TEXT
QWEN3: dict[str, Any] = {"model_type": "qwen3"} | TEXT
LLAMA: dict[str, Any] = {"model_type": "llama"} | TEXT
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 21,
    "type_vocab_size": 3,
}
WHOLE_MODELS = (QWEN3_OMNI, QWEN2_5_OMNI, QWEN3_VL_MOE, QWEN3_MOE, QWEN3, LLAMA, BERT)


def change(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `config` with values put under keys such as ``thinker_config__text_config__hidden_size``."""
    changed = copy.deepcopy(config)
    for path, value in changes.items():
        *sections, key = path.split("__")
        inner = changed
        for section in sections:
            inner = inner[section]
        inner[key] = value
    return changed
