"""A run in segments gives the bits of the whole model: logits, states and the experts that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")


class Whole:
    """The loaded model: logits, states behind each layer, chosen experts, by sample."""

    def __init__(self, folder: Path, batches: list[Any], dtype: Any, attention: str) -> None:
        from omnifp4.runtime import load
        from omnifp4.segments.inputs import thinker_arguments

        thinker = load(folder, device="cpu", dtype=dtype, speech=False, progress=False).thinker
        text = thinker.get_decoder()
        text.config._attn_implementation = attention
        self.experts: dict[tuple[int, int], Any] = {}
        self.states: dict[tuple[int, int], Any] = {}
        self.logits: list[Any] = []
        for number, layer in enumerate(text.layers):
            layer.mlp.experts.register_forward_pre_hook(self._choices(number))
            # What enters a layer is what left the one before, features of pictures included.
            layer.register_forward_pre_hook(self._entering(number - 1))
        text.norm.register_forward_pre_hook(self._entering(len(text.layers) - 1))
        for batch in batches:
            with torch.no_grad():
                output = thinker(**thinker_arguments(thinker, batch, torch.device("cpu")))
            self.logits.append(output.logits[0])

    def _entering(self, layer: int) -> Callable[[Any, Any], None]:
        def keep(_: Any, values: Any) -> None:
            self.states[layer, len(self.logits)] = values[0].clone()

        return keep

    def _choices(self, layer: int) -> Callable[[Any, Any], None]:
        def keep(_: Any, values: Any) -> None:
            self.experts[layer, len(self.logits)] = values[1].clone()

        return keep


def segmented(folder: Path, batches: list[Any], **options: Any) -> tuple[list[Any], list[Any], Any]:
    from omnifp4.segments import run_segments

    logits: dict[int, list[Any]] = {}
    kept = []

    def on_layer(visit: Any) -> None:
        kept.append((visit.layer, visit.sample, visit.after.clone(), visit.routing.experts.clone()))

    run = run_segments(
        folder,
        batches,
        on_layer=on_layer,
        on_logits=lambda sample, _, values: logits.setdefault(sample, []).append(values.clone()),
        **options,
    )
    return [torch.cat(logits[number]) for number in range(len(batches))], kept, run


@pytest.mark.parametrize(
    ("packed", "dtype", "attention"),
    [
        (False, "bfloat16", "sdpa"),
        (False, "float32", "eager"),
        (True, "bfloat16", "eager"),
        (True, "float32", "sdpa"),
    ],
)
def test_bit_for_bit(
    tiny_omni: Path, tiny_artifact: Path, batches: list[Any], packed: bool, dtype: str, attention: str
) -> None:
    folder, kind = tiny_artifact if packed else tiny_omni, getattr(torch, dtype)
    whole = Whole(folder, batches, kind, attention)
    logits, kept, run = segmented(folder, batches, dtype=kind, attention=attention)
    assert run.layers == run.layers_in_all == 4
    assert len(kept) == 4 * len(batches)
    for number, (mine, theirs) in enumerate(zip(logits, whole.logits, strict=True)):
        assert torch.equal(mine, theirs), number
    for layer, sample, states, experts in kept:
        assert torch.equal(experts, whole.experts[layer, sample])
        assert torch.equal(states, whole.states[layer, sample])


def test_the_comparison_can_fail(tiny_omni: Path, tiny_artifact: Path, batches: list[Any]) -> None:
    """FP4 weights and another attention both move the bits, so equal bits above mean something."""
    exact, _, _ = segmented(tiny_omni, batches[:2], attention="sdpa")
    eager, _, _ = segmented(tiny_omni, batches[:2], attention=["sdpa", "eager"])
    fp4, _, _ = segmented(tiny_artifact, batches[:2], attention="sdpa")
    assert torch.equal(exact[0], eager[0])
    assert not torch.equal(exact[1], eager[1])
    assert not torch.equal(exact[0], fp4[0])


def test_wanted_positions_and_stopping(tiny_omni: Path, batches: list[Any]) -> None:
    from omnifp4.segments import run_segments

    all_of_it, _, _ = segmented(tiny_omni, batches[:1])
    wanted = torch.tensor([3, 1])
    found: list[Any] = []
    run_segments(
        tiny_omni, batches[:1], positions=[wanted], on_logits=lambda _, first, values: found.append((first, values))
    )
    assert [first for first, _ in found] == [0]
    assert found[0][1].shape == (2, all_of_it[0].shape[1])
    assert (found[0][1].float() - all_of_it[0][wanted].float()).abs().max() < 0.02

    layers: list[int] = []
    run = run_segments(tiny_omni, batches[:1], layers=2, on_layer=lambda visit: layers.append(visit.layer))
    assert (run.layers, layers) == (2, [0, 1])


def test_states_above_the_limit_lie_in_a_file(tiny_omni: Path, batches: list[Any]) -> None:
    in_memory, _, run = segmented(tiny_omni, batches)
    spilled, _, _ = segmented(tiny_omni, batches, spill_bytes=run.states_bytes - 1)
    assert all(torch.equal(one, other) for one, other in zip(in_memory, spilled, strict=True))


def test_only_one_layer_is_in_memory(tiny_omni: Path, batches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At no visit has more than the visited layer its weights; none has memory when all is done."""
    from omnifp4.segments import run_segments
    from omnifp4.segments import skeleton as skeletons

    made: list[Any] = []
    build = skeletons._build
    monkeypatch.setattr(skeletons, "_build", lambda *values: made.append(build(*values)) or made[-1])

    def held() -> set[int]:
        layers = made[0].thinker.get_decoder().layers
        return {number for number, layer in enumerate(layers) if any(not value.is_meta for value in layer.parameters())}

    def other_parts() -> list[str]:
        return [name for name, value in made[0].named_parameters() if not value.is_meta and ".layers." not in name]

    seen: list[set[int]] = []

    def look(visit: Any) -> None:
        seen.append(held())
        assert not other_parts(), "embeddings and towers are gone"

    run_segments(tiny_omni, batches, on_layer=look, layers=4)
    for number, layers in enumerate(seen):
        assert layers == {number // len(batches)}
    assert held() == set()
