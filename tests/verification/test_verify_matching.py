"""The bulk matcher answers as the dialects do, and engines' names are as their mappers make them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT
from omnifp4.verification.engines import STAGES, fused_name
from omnifp4.verification.matching import excluded_by_compressed_tensors, excluded_by_modelopt

WORDS = st.sampled_from(["thinker", "talker", "model", "layers", "0", "1", "10", "mlp", "gate", "gate_proj", "lm_head"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
WILD = st.tuples(st.sampled_from(["", "*", "*."]), NAMES, st.sampled_from(["", "*", ".*", "?"])).map("".join)
EXPRESSIONS = st.tuples(st.sampled_from(["re:", "re:.*", r"re:.*\."]), NAMES, st.sampled_from(["", "$", ".*"])).map(
    "".join
)


@given(st.lists(NAMES, unique=True, max_size=8), st.lists(WILD | NAMES, max_size=5))
def test_modelopt(modules, entries):
    expected = {module for module in modules if MODELOPT.is_ignored(module, entries)}
    assert excluded_by_modelopt(modules, entries) == expected


@given(st.lists(NAMES, unique=True, max_size=8), st.lists(EXPRESSIONS | NAMES | WILD, max_size=5))
def test_compressed_tensors(modules, entries):
    expected = {module for module in modules if COMPRESSED_TENSORS.is_ignored(module, entries)}
    assert excluded_by_compressed_tensors(modules, entries) == expected


@pytest.mark.parametrize(
    ("stage", "module", "name"),
    [
        (0, "thinker.model.layers.0.self_attn.k_proj", "language_model.model.layers.0.self_attn.qkv_proj"),
        (0, "thinker.model.layers.0.mlp.experts.7.up_proj", "language_model.model.layers.0.mlp.experts"),
        (0, "thinker.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        (1, "thinker.model.layers.0.mlp.gate", "thinker.language_model.model.layers.0.mlp.gate"),
        (1, "thinker.lm_head", "thinker.language_model.lm_head"),
        (2, "talker.model.layers.0.mlp.shared_expert.gate_proj",
         "talker.language_model.model.layers.0.mlp.shared_expert.gate_up_proj"),
    ],
)  # fmt: skip
def test_engine_names(stage, module, name):
    found = STAGES["qwen3_omni_moe"][stage]
    assert found.asked.match(module)
    assert fused_name(found.module_name(module)) == name
