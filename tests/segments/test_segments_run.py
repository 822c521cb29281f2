"""Visits, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_segments_equal import segmented

from omnifp4.errors import OmniFP4Error

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_of_linears_and_experts(tiny_omni: Path, tiny_artifact: Path, batches: list[Any], packed: bool) -> None:
    """The mixture worked out from what a visit gives is the layer's own."""
    from omnifp4.segments import run_segments

    checked = []

    def look(visit: Any) -> None:
        name = visit.name
        assert name == f"thinker.model.layers.{visit.layer}"
        attention = [f"{name}.self_attn.{part}_proj" for part in "qkvo"]
        assert sorted(visit.inputs) == sorted([*attention, f"{name}.mlp.experts"])
        tokens = visit.before.shape[1]
        assert all(len(value) == tokens for value in visit.inputs.values())
        mixed = torch.zeros(tokens, visit.after.shape[-1])
        for expert in range(8):
            places, slots = torch.where(visit.routing.experts == expert)
            if not len(places):
                continue
            inner = visit.expert_inner(expert)
            assert len(inner) == len(places) == len(visit.expert_inputs(expert))
            module = visit.experts
            down = module.backend.dequantize(module.down(expert), inner.dtype) if packed else module.down_proj[expert]
            weights = visit.routing.weights[places, slots][:, None]
            mixed[places] += (torch.nn.functional.linear(inner, down) * weights).float()
        captured = own_mixture(visit)
        assert (mixed - captured).norm() / captured.norm() < 0.02
        checked.append(visit.sample)

    def own_mixture(visit: Any) -> Any:
        with torch.no_grad():
            inputs = visit.inputs[f"{visit.name}.mlp.experts"]
            return visit.experts(inputs, visit.routing.experts, visit.routing.weights).float()

    run_segments(tiny_artifact if packed else tiny_omni, batches[:2], layers=2, on_layer=look)
    assert checked == [0, 1, 0, 1]


def test_it_goes_on_after_it_was_killed(tiny_omni: Path, batches: list[Any], tmp_path: Path) -> None:
    expected, _, _ = segmented(tiny_omni, batches)

    class Killed(Exception):
        pass

    from omnifp4.segments import run_segments

    def kill(visit: Any) -> None:
        if (visit.layer, visit.sample) == (2, 1):
            raise Killed

    with pytest.raises(Killed):
        run_segments(tiny_omni, batches, work=tmp_path / "work", on_layer=kill)
    assert json.loads((tmp_path / "work" / "segments.json").read_text())["layers"] == 2
    found, kept, run = segmented(tiny_omni, batches, work=tmp_path / "work")
    assert run.resumed_after == 2
    assert [layer for layer, *_ in kept] == [2] * len(batches) + [3] * len(batches)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # Other samples are another run.
    _, _, run = segmented(tiny_omni, batches[:2], work=tmp_path / "work")
    assert run.resumed_after == 0


def test_two_runs_do_not_share_a_folder(tiny_omni: Path, batches: list[Any], tmp_path: Path) -> None:
    from omnifp4.segments import run_segments

    def second(visit: Any) -> None:
        with pytest.raises(OmniFP4Error, match="another run is at work there"):
            run_segments(tiny_omni, batches[:1], work=tmp_path / "work")

    run_segments(tiny_omni, batches[:1], layers=1, work=tmp_path / "work", on_layer=second)
    assert run_segments(tiny_omni, batches[:1], work=tmp_path / "work").resumed_after == 1


def test_the_next_layer_is_asked_for_in_time(
    tiny_omni: Path, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.segments import run_segments
    from omnifp4.segments.loading import PartLoader

    begun: list[str] = []
    advise, take = PartLoader.read_ahead, PartLoader.take
    monkeypatch.setattr(PartLoader, "read_ahead", lambda self, part: (begun.append(part.name), advise(self, part)))
    monkeypatch.setattr(PartLoader, "take", lambda self, part: (begun.append(f"take {part.name}"), take(self, part))[1])
    run_segments(tiny_omni, batches[:1], on_logits=lambda *_: None)
    for number in range(3):
        assert begun.index(f"layer {number + 1}") < begun.index(f"take layer {number}")
    assert begun.index("head") < begun.index("take layer 3")


def test_all_of_a_part_is_asked_for(tiny_omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the file, in pieces that Linux does not cut short."""
    import os

    from omnifp4.checkpoint.folder import open_checkpoint
    from omnifp4.segments.loading import ADVISED_BYTES, PartLoader
    from omnifp4.segments.skeleton import Skeleton

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, length, __: asked.append((begin, begin + length)))
    opened, host = open_checkpoint(tiny_omni), torch.device("cpu")
    skeleton = Skeleton(opened, dtype=torch.bfloat16, device=host)
    part = skeleton.parts["layer 1"]
    with PartLoader(skeleton, opened, device=host, backend="auto") as loader:
        loader._advise(part)
    assert asked == sorted(asked)
    assert max(end - begin for begin, end in asked) == ADVISED_BYTES
    bytes_asked = {place for begin, end in asked for place in range(begin, end)}
    assert bytes_asked == {place for entry in part.entries.values() for place in range(entry.begin, entry.end)}
    assert len(bytes_asked) == sum(end - begin for begin, end in asked)


def test_refusals(tiny_omni: Path, batches: list[Any], tmp_path: Path) -> None:
    from omnifp4.segments import run_segments

    with pytest.raises(OmniFP4Error, match="no samples"):
        run_segments(tiny_omni, [])
    with pytest.raises(OmniFP4Error, match="has 4 decoder layers, so it cannot stop after 5"):
        run_segments(tiny_omni, batches[:1], layers=5)
    shutil.copytree(tiny_omni, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(OmniFP4Error, match="type 'bert' cannot run in segments"):
        run_segments(tmp_path / "other", batches[:1])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("thinker.model.layers.1.mlp.experts.3.up_proj.weight", "of the layer 1 has 262,144 values and the checkpoint"),
        ("thinker.model.layers.2.self_attn.q_norm.weight", "of the layer 2 has 64 values and the checkpoint 0"),
        ("thinker.lm_head.weight", "no tensor of the head is there"),
        ("thinker.audio_tower.conv2d1.bias", "of the audio tower has 32 values and the checkpoint 0"),
    ],
)
def test_a_missing_tensor_is_named(tiny_omni: Path, batches: list[Any], tmp_path: Path, name: str, told: str) -> None:
    from omnifp4.segments import run_segments
    from small_checkpoints import file_bytes, read_tensors

    shutil.copytree(tiny_omni, tmp_path / "torn")
    tensors = read_tensors(tiny_omni)
    del tensors[name]
    (tmp_path / "torn" / "model.safetensors").write_bytes(file_bytes(tensors))
    with pytest.raises(OmniFP4Error, match=told):
        run_segments(tmp_path / "torn", batches, on_logits=lambda *_: None)
