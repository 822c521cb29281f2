"""Bytes of a decode step against a count by hand, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnifp4.benchmark.roofline import bound, count_traffic, step_bytes, uniform_experts
from omnifp4.benchmark.synthetic import make_model
from omnifp4.benchmark.tiers import judge_tiers
from omnifp4.receipt.bench import TierVerdict

GIB = 2**30


def model(packed: bool, parts: str) -> Any:
    return make_model("tiny", packed=packed, parts=parts, layers=None, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("parts", ["text", "all"])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_equal_a_count_by_hand(packed: bool, parts: str) -> None:
    """The tiny thinker: 4 layers, hidden 128, 4 heads and 2 of keys of width 64, 8 experts of 128, 2,048 words."""
    layers, hidden, heads, key_heads, head, inner, experts, words = 4, 128, 4, 2, 64, 128, 8, 2048
    found = model(packed, parts)
    text = found.config.thinker_config.text_config
    assert [text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.moe_intermediate_size, text.num_experts, text.vocab_size] == [layers, hidden, heads, key_heads, head, inner, experts, words]  # fmt: skip

    def matrix(outputs: int, inputs: int) -> int:
        return outputs * inputs // 2 + outputs * inputs // 16 if packed else 2 * outputs * inputs

    scale = 4 if packed else 0
    projections = [
        (heads * head, hidden),
        (key_heads * head, hidden),
        (key_heads * head, hidden),
        (hidden, heads * head),
    ]
    attention = sum(matrix(*shape) + scale for shape in projections)
    norms = 2 * (2 * hidden + 2 * head)
    router = 2 * experts * hidden
    always = layers * (attention + norms + router) + 2 * hidden + 2 * words * hidden
    # Gate and up share a tensor scale.
    expert = matrix(2 * inner, hidden) + matrix(hidden, inner) + 2 * scale
    traffic = count_traffic(found)
    assert traffic.always == always
    assert traffic.expert == expert
    assert traffic.layers == layers
    assert traffic.row == 2 * hidden
    assert traffic.cache_token == 2 * layers * key_heads * head * 2

    by_hand = always + layers * 3 * expert + 2 * (2 * hidden) + 2 * (100 + 1) * traffic.cache_token
    assert step_bytes(traffic, batch=2, experts=3, context=100) == by_hand


def test_uniform_routing_as_the_field_knows_it() -> None:
    assert uniform_experts(128, 8, 1) == pytest.approx(8)
    assert round(uniform_experts(128, 8, 8)) == 52
    assert round(uniform_experts(128, 8, 32)) == 112


def test_bound() -> None:
    # 2.18 GB a token at 4.3 TB/s.
    assert round(bound(2_180_000_000, 1, 4.3e12)) == 1972
    assert bound(2_180_000_000, 8, 4.3e12) == pytest.approx(8 * bound(2_180_000_000, 1, 4.3e12))


def test_three_verdicts_of_a_tier() -> None:
    weights = {"experts": 16 * GIB, "audio tower": 2 * GIB, "talker": 50 * GIB}
    minimum, target, optimal = judge_tiers(weights, 11.0, "")
    assert [minimum.verdict, target.verdict, optimal.verdict] == [TierVerdict.PASS, TierVerdict.PASS, TierVerdict.FAIL]
    # Speech is not on the thinker's path.
    assert minimum.gib == 18
    assert minimum.parts == "text decoder, audio tower"
    assert "18.0 GiB is not below 17" in optimal.reason
    slow = judge_tiers({"experts": 16 * GIB}, 4.0, "")
    assert [tier.verdict for tier in slow] == [TierVerdict.PASS, TierVerdict.FAIL, TierVerdict.FAIL]
    assert "4.0 tok/s is not above 5" in slow[1].reason
    unknown = judge_tiers({"experts": 25 * GIB}, None, "")
    assert [tier.verdict for tier in unknown] == [TierVerdict.NOT_MEASURED, TierVerdict.FAIL, TierVerdict.FAIL]
    cut = judge_tiers({"experts": GIB}, 1000.0, "the model is cut to 1 layer(s)")
    assert {tier.verdict for tier in cut} == {TierVerdict.NOT_MEASURED}
    assert cut[0].tokens_per_second is None
