"""Prompts that are filled up for a graph: what fills them changes nothing. Kernels and graphs are stand-ins in torch."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from omnifp4.decoding import prefill as room
from omnifp4.decoding.decoder_weights import DecoderWeights, read_weights
from omnifp4.decoding.paged_cache import PagedCache, pages_for
from omnifp4.decoding.prefill import DecoderInputs, Prefill
from omnifp4.kernels import decode_reference as reference
from omnifp4.kernels.cuda.shapes import PAGE

STATES_AFTER = 1
TEXT = "Repeat: 4 8 1 5 0 9. The film was the first of its kind, and it was shown in many towns. "


class Kernels:
    """`PromptKernels` in torch."""

    def __init__(self, shape: Any, device: Any) -> None:
        self.shape = shape

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(reference.norm(x.float(), weight, eps))

    def place_heads(
        self, qkv: torch.Tensor, norms: Any, eps: float, rotary: Any, table: torch.Tensor, cache: Any
    ) -> None:
        shape = self.shape
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        q, k, v = heads.tensor_split([shape.heads, shape.heads + shape.kv_heads], dim=1)
        for part, weight in ((q, norms[0]), (k, norms[1])):
            part.copy_(reference.rotate(reference.norm(part.float(), weight, eps), *(one[:, None] for one in rotary)))
        tokens = torch.arange(len(qkv))
        for held, new in zip(cache, (k, v), strict=True):
            held[table[tokens // PAGE].long(), :, tokens % PAGE] = new


class Replayed(Prefill):
    """Its graphs run what they captured again."""

    def _capture(self, tokens: int, states_after: int | None) -> Any:
        made = super()._capture(tokens, states_after)

        def again() -> None:
            logits, states = self._run(made.hidden, made.places, made.last, states_after)
            made.logits.copy_(logits)
            made.states.copy_(states)

        return replace(made, graph=SimpleNamespace(replay=again))


@pytest.fixture(scope="module")
def weights(trained_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> DecoderWeights:
    """Of the trained model: routers of random weights hesitate, and then a rounding is another token."""
    from omnifp4 import quantize
    from omnifp4.runtime import load

    out = tmp_path_factory.mktemp("prefill_filled") / "trained-nvfp4"
    quantize(trained_omni, out, threads=2)
    return read_weights(load(str(out), device="cpu", speech=False, progress=False))


@pytest.fixture(scope="module")
def ids(trained_omni: Path) -> torch.Tensor:
    """A text that the model can follow."""
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(trained_omni)(TEXT * 12)["input_ids"])


@pytest.fixture(autouse=True)
def on_a_cpu(weights: DecoderWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU has."""
    owners = {layer.experts.gate_up_packed.data_ptr(): layer.experts for layer in weights.layers}  # type: ignore[union-attr,operator]

    def experts(x: torch.Tensor, index: torch.Tensor, chosen: torch.Tensor, gate_up: Any, _: Any) -> torch.Tensor:
        routed = index[:, 0] >= 0
        out = torch.zeros_like(x)
        out[routed] = owners[gate_up[0].data_ptr()](x[routed], index[routed], chosen[routed])
        return out

    for name, parts in (("experts", {"experts": experts}), ("matrices", {"PackedMatrices": lambda *parts: parts})):
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, f"omnifp4.kernels.prefill.{name}", module)
    monkeypatch.setattr(room, "PromptKernels", Kernels)
    monkeypatch.setattr(Prefill, "_linear", lambda _, x, matrix: x @ reference.weights_of(matrix).to(x.dtype).T)

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: (0, 0)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))


def cache_of(weights: DecoderWeights, pages: int) -> PagedCache:
    cache = PagedCache(weights.shape, len(weights.layers), 2, 4 * PAGE, pages, torch.device("cpu"))
    cache.keys.fill_(7), cache.values.fill_(7)
    return cache


@pytest.mark.parametrize("length", [1, 16, 17, 64, 130])
def test_what_fills_a_prompt_changes_nothing(weights: DecoderWeights, ids: torch.Tensor, length: int) -> None:
    inputs = DecoderInputs(weights.embeddings[ids[:length]], torch.arange(length).expand(3, 1, -1), 0, None, ())
    plain, filled = cache_of(weights, 6), cache_of(weights, 6)
    assert plain.take(length) == filled.take(length) == 0
    wanted = Prefill(weights, plain)
    wanted._packed = False  # no graphs
    logits, states = wanted.run(inputs, 0, STATES_AFTER)
    graphs = Replayed(weights, filled)
    neighbour = filled.take(70)
    longest = replace(inputs, hidden=weights.embeddings[ids[:70]], positions=torch.arange(70).expand(3, 1, -1))
    graphs.run(longest, neighbour, STATES_AFTER)
    before = filled.keys[:, filled.tables[neighbour, :2].long()].clone()
    got, got_states = graphs.run(inputs, 0, STATES_AFTER)
    torch.testing.assert_close(got, logits, rtol=0.02, atol=0.05)
    assert states is not None and got_states is not None
    torch.testing.assert_close(got_states, states, rtol=0.02, atol=0.05)
    own = filled.tables[0, : pages_for(length)].long()
    for held, plainly in ((filled.keys, plain.keys), (filled.values, plain.values)):
        places = [one[:, own].transpose(2, 3).flatten(1, 2)[:, :length] for one in (held, plainly)]
        torch.testing.assert_close(*places, rtol=0.02, atol=0.05)
    assert torch.equal(filled.keys[:, filled.tables[neighbour, :2].long()], before), "a neighbour's pages are its own"
    untouched = set(range(6)) - set(own.tolist()) - set(filled.tables[neighbour, :2].tolist())
    assert (filled.keys[:, sorted(untouched)] == 7).all()
    assert len(graphs._captured) == len({next(n for n in room.GRAPH_TOKENS if n >= size) for size in (70, length)})
