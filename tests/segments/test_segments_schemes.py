"""Layers in FP8, MXFP4 and INT8 run in segments as they do in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_segments_equal import Whole, segmented

from small_checkpoints import MIXED_COMPONENTS

torch: Any = pytest.importorskip("torch")


@pytest.mark.parametrize("dialect", MIXED_COMPONENTS)
def test_bit_for_bit(mixed_artifacts: dict[str, Path], batches: list[Any], dialect: str) -> None:
    some = batches[:1]
    whole = Whole(mixed_artifacts[dialect], some, torch.bfloat16, "sdpa")
    logits, kept, _ = segmented(mixed_artifacts[dialect], some, dtype=torch.bfloat16, attention="sdpa")
    assert torch.equal(logits[0], whole.logits[0])
    assert len(kept) == 4
    for layer, sample, states, experts in kept:
        assert torch.equal(experts, whole.experts[layer, sample])
        assert torch.equal(states, whole.states[layer, sample])
