"""A config that is wrong is refused with the key and the value; no config whatever leads to another exception."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_model_configs as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model_configs import change

from omnifp4.errors import ModelError
from omnifp4.models import KNOWN_MODEL_TYPES, Layout, layout_for

REFUSALS = [
    ({}, "model_type is missing; known: qwen3_omni_moe, "),
    ({"model_type": "gpt5"}, "model_type 'gpt5' has no layout here; known: qwen3_omni_moe, "),
    ({"model_type": ["llama"]}, r"model_type \['llama'\] has no layout"),
    ([], r"config: it is \[\], not a mapping"),
    ({"model_type": "qwen3_omni_moe"}, "thinker_config is missing"),
    (change(tiny.QWEN3_OMNI, thinker_config=[]), r"thinker_config is \[\]: it must be a mapping"),
    (change(tiny.QWEN3_OMNI, thinker_config__vision_config=None), "thinker_config.vision_config is missing"),
    (
        change(tiny.QWEN3_OMNI, thinker_config__text_config__hidden_size="2048"),
        "thinker_config.text_config.hidden_size is '2048': it must be an integer from 1 to",
    ),
    (change(tiny.QWEN3_OMNI, thinker_config__text_config__hidden_act="gelu"), "hidden_act is 'gelu': .* 'silu'"),
    (change(tiny.QWEN3_OMNI, thinker_config__text_config__mlp_only_layers=[-1]), r"mlp_only_layers is \[-1\]"),
    (change(tiny.QWEN3_OMNI, enable_audio_output="yes"), "enable_audio_output is 'yes': it must be true or false"),
    (change(tiny.QWEN3_OMNI, talker_config__text_config__num_experts=0), "num_experts is 0: .* every layer"),
    (
        change(tiny.QWEN3_OMNI, talker_config__text_config__num_local_experts=5),
        "num_experts is 4 but talker_config.text_config.num_local_experts, its other name, is 5",
    ),
    (change(tiny.QWEN3_OMNI, code2wav_config__decoder_dim=3), "code2wav_config.decoder_dim is 3"),
    (change(tiny.QWEN3_OMNI, code2wav_config__upsample_rates="853"), "upsample_rates is '853'"),
    (change(tiny.QWEN2_5_OMNI, token2wav_config__dit_config__enc_kernel_sizes=[5]), "enc_kernel_sizes is"),
    (change(tiny.QWEN2_5_OMNI, token2wav_config__dit_config__enc_res2net_scale=64), "enc_res2net_scale is 64"),
    (
        change(tiny.QWEN2_5_OMNI, token2wav_config__bigvgan_config__upsample_kernel_sizes=[7]),
        "upsample_kernel_sizes is",
    ),
    (change(tiny.QWEN2_5_OMNI, token2wav_config=None), "token2wav_config is missing"),
    (tiny.QWEN3 | {"hidden_size": True}, "hidden_size is True"),
    (tiny.QWEN3 | {"hidden_size": 2048.0}, "hidden_size is 2048.0"),
    (tiny.QWEN3 | {"hidden_size": -1}, "hidden_size is -1"),
    (tiny.QWEN3 | {"hidden_size": 10**5000}, "hidden_size is a int too large to show"),
    (tiny.QWEN3 | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    (tiny.QWEN3 | {"num_attention_heads": 5}, "num_key_value_heads is 2: it must be a divisor of .* 5"),
    (tiny.LLAMA | {"num_attention_heads": 64}, "num_attention_heads is 64: it must be at most hidden_size, 32"),
    (tiny.QWEN3 | {"architectures": "Qwen3Model"}, "architectures is 'Qwen3Model'"),
    (tiny.QWEN3_MOE | {"num_experts": 2**20, "num_hidden_layers": 1000}, "num_hidden_layers x num_experts is 1000 x"),
    (tiny.QWEN3_MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok is 0: it must be an integer from 1 to 4"),
    (tiny.QWEN3_MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok is 5: it must be an integer from 1 to 4"),
    (tiny.BERT | {"add_cross_attention": True}, "add_cross_attention is True"),
    (tiny.BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    (tiny.BERT | {"num_attention_heads": 5}, "num_attention_heads is 5: it must be a divisor of hidden_size, 32"),
]


@pytest.mark.parametrize(("config", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_wrong_config_is_refused_by_key_and_value(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        layout_for(config)


def test_the_missing_width_of_the_shared_expert_is_named() -> None:
    config = copy.deepcopy(tiny.QWEN3_OMNI)
    del config["talker_config"]["text_config"]["shared_expert_intermediate_size"]
    with pytest.raises(ModelError, match=r"talker_config\.text_config\.shared_expert_intermediate_size is missing"):
        layout_for(config)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 3, 7, 64, 10**4000])
    | st.floats()
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def paths(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


BASES = [config | {"architectures": [], "enable_audio_output": True} for config in tiny.WHOLE_MODELS]
PLACES = [(base, path) for base in BASES for path in paths(base) if path != ("model_type",)]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.sampled_from(PLACES), JUNK, st.booleans())
def test_any_value_at_any_key_gives_a_layout_or_a_model_error(
    place: tuple[dict[str, Any], tuple[str, ...]], junk: Any, drop: bool
) -> None:
    base, path = place
    config = copy.deepcopy(base)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = junk
    try:
        layout = layout_for(config)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return
    assert isinstance(layout, Layout)
    assert all(size > 0 for tensor in layout.tensors for size in tensor.shape)
    assert len(layout.by_name) == len(layout.tensors)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(KNOWN_MODEL_TYPES), st.dictionaries(st.sampled_from(sorted({p[-1] for _, p in PLACES})), JUNK))
def test_any_mapping_gives_a_layout_or_a_model_error(model_type: str, config: dict[str, Any]) -> None:
    try:
        layout_for(config | {"model_type": model_type})
    except ModelError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JUNK)
def test_anything_at_all_is_refused_in_one_line(junk: Any) -> None:
    with pytest.raises(ModelError) as caught:
        layout_for(junk)
    assert "\n" not in str(caught.value)
