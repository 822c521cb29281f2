"""What is in a statistics file is what the linears read; a file that is not right is refused in one line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifp4.errors import OmniFP4Error
from omnifp4.tiny import write_tiny_omni

torch: Any = pytest.importorskip("torch")
pytest.importorskip("transformers")

LAYER = "thinker.model.layers.1"


def check(found: Any, inputs: Any) -> None:
    """Against the definitions, in float64."""
    x = inputs.double()
    assert found.tokens == len(x)
    assert found.amax.shape == ()
    assert found.amax.dtype == torch.float32
    assert found.amax.item() == x.abs().max().item()
    torch.testing.assert_close(found.abs_mean.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.square_mean.double(), x.square().mean(0), rtol=2e-6, atol=0)
    blocks = torch.stack([part.T @ part / len(x) for part in x.split(16, dim=1)])
    assert found.block_hessian.shape == (x.shape[1] // 16, 16, 16)
    scale = blocks.abs().max().item()
    torch.testing.assert_close(found.block_hessian.double(), blocks, rtol=1e-5, atol=1e-7 * scale)


def test_values_are_those_of_the_whole_model(captured: tuple[Path, Any], seen: Any) -> None:
    from omnifp4.calibration.statistics import open_statistics

    with open_statistics(captured[0]) as statistics:
        for part in ("q_proj", "k_proj", "v_proj"):
            check(statistics.of(f"{LAYER}.self_attn.{part}.weight"), seen.inputs["qkv"])
        check(statistics.of(f"{LAYER}.self_attn.o_proj.weight"), seen.inputs["o_proj"])
        check(statistics.of("thinker.lm_head.weight"), seen.inputs["head"])
        check(statistics.of("thinker.visual.blocks.0.mlp.linear_fc2.weight"), seen.inputs["vision"])
        check(statistics.of("thinker.audio_tower.layers.0.fc1.weight"), seen.inputs["audio"])
        routed = 0
        for expert in range(8):
            name, inputs = f"{LAYER}.mlp.experts.{expert}", seen.routed(expert)
            assert statistics.tokens(f"{name}.up_proj.weight") == len(inputs)
            if len(inputs) < captured[1].least_tokens:
                assert statistics.source(f"{name}.up_proj.weight") == "all-expert"
                continue
            routed += 1
            assert statistics.source(f"{name}.down_proj.weight") == "routed"
            for part in ("gate_proj", "up_proj"):
                check(statistics.of(f"{name}.{part}.weight"), inputs)
            found = statistics.of(f"{name}.down_proj.weight")
            inner = seen.inner(expert, inputs).double()
            torch.testing.assert_close(found.square_mean.double(), inner.square().mean(0), rtol=2e-2, atol=1e-6)
            assert found.tokens == len(inner)
        assert routed >= 4


def test_names_are_those_of_the_checkpoint(captured: tuple[Path, Any], tiny_omni: Path) -> None:
    from omnifp4.calibration.statistics import open_statistics
    from omnifp4.checkpoint.folder import open_checkpoint

    tensors = open_checkpoint(tiny_omni).tensors
    with open_statistics(captured[0], tiny_omni) as statistics:
        names = statistics.names()
        assert set(names) <= set(tensors)
        assert all(name in statistics for name in names)
        assert all(statistics.of(name).square_mean.shape == (tensors[name].shape[1],) for name in names[::7])
        assert sum(name.startswith("thinker.model.layers.") for name in names) == 4 * (4 + 3 * 8)
        for wanted in (
            "talker.model.layers.1.self_attn.q_proj",
            "talker.codec_head",
            "talker.code_predictor.lm_head.2",
        ):
            assert f"{wanted}.weight" in statistics
        for unknown in ("thinker.model.layers.9.self_attn.q_proj.weight", f"{LAYER}.mlp.experts.8.up_proj.weight", ""):
            assert unknown not in statistics
            assert statistics.source(unknown) == "none"
            assert statistics.tokens(unknown) == 0
        with pytest.raises(OmniFP4Error, match=r"no statistics of 'thinker.visual.x.weight': it is in no bank"):
            statistics.of("thinker.visual.x.weight")


def test_experts_that_saw_too_few(
    calibrate: Callable[..., Any], tiny_omni: Path, tmp_path: Path, sequences: list[Any], seen: Any
) -> None:
    """Below the threshold the all-expert statistics take their place, which come from tokens of all; below it, nothing."""
    from omnifp4.calibration.statistics import open_statistics

    name = f"{LAYER}.mlp.experts.3"
    all_tokens = len(seen.inputs["qkv"])
    out = tmp_path / "all"
    receipt = calibrate(tiny_omni, out, samples=len(sequences), least_tokens=all_tokens, all_expert_tokens=10**6)
    assert [(one.too_few, one.data_free) for one in receipt.experts] == [(8, 0)] * 4
    with open_statistics(out) as statistics:
        assert statistics.source(f"{name}.up_proj.weight") == "all-expert"
        found = statistics.of(f"{name}.gate_proj.weight")
        assert found.source == "all-expert"
        check(found, seen.inputs["experts"])
        inner = seen.inner(3, seen.inputs["experts"]).double()
        down = statistics.of(f"{name}.down_proj.weight")
        assert down.tokens == all_tokens
        torch.testing.assert_close(down.abs_mean.double(), inner.abs().mean(0), rtol=2e-2, atol=1e-6)
    out = tmp_path / "none"
    receipt = calibrate(tiny_omni, out, least_tokens=10**6, all_expert_tokens=0, block_hessians=False)
    assert [(one.too_few, one.data_free) for one in receipt.experts] == [(8, 8)] * 4
    with open_statistics(out) as statistics:
        assert f"{name}.up_proj.weight" not in statistics
        assert statistics.source(f"{name}.up_proj.weight") == "none"
        assert statistics.tokens(f"{name}.up_proj.weight") > 0
        assert not any(".experts." in one for one in statistics.names())
        with pytest.raises(OmniFP4Error, match=r"it saw \d+ tokens \(take the data-free rule"):
            statistics.of(f"{name}.up_proj.weight")
        assert statistics.of(f"{LAYER}.self_attn.o_proj.weight").block_hessian is None


def test_an_expert_that_is_never_chosen() -> None:
    from types import SimpleNamespace

    from omnifp4.calibration.record import expert_tokens
    from omnifp4.calibration.sums import Collector, routed_tokens

    random = torch.Generator().manual_seed(0)
    module = SimpleNamespace(
        gate_up_proj=torch.randn(4, 64, 32, generator=random), down_proj=torch.randn(4, 32, 32, generator=random),
        act_fn=torch.nn.functional.silu,
    )  # fmt: skip
    # The last expert overflows on tokens that the router never sends to it.
    module.gate_up_proj[3] *= torch.inf
    inputs, chosen = torch.randn(100, 32, generator=random), torch.randint(0, 3, (100, 1), generator=random)
    collector = Collector(blocks=True, all_expert_tokens=40, stride=2)
    for begin in range(0, 100, 30):
        collector.add_experts("m.experts", module, inputs[begin : begin + 30], chosen[begin : begin + 30])
    collector.finish()
    tokens = routed_tokens(collector.tensors, "m.experts")
    assert tokens[3] == 0
    assert sum(tokens) == 100
    kept = inputs[::2][:40]
    assert torch.allclose(collector.tensors["m.experts.gate_up.all-expert.abs_mean"][0], kept.abs().mean(0))
    shared = collector.tensors["m.experts.down.all-expert.tokens"].tolist()
    assert shared == [40, 40, 40, 0]
    assert all(value.isfinite().all() for value in collector.tensors.values() if value.is_floating_point())
    told = expert_tokens("m.experts", tokens, shared, 10)
    assert (told.too_few, told.data_free) == (1, 1)


def _changed(path: Path, change: Callable[[bytearray], bytes]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def _flip(data: bytearray) -> bytes:
    data[-5] ^= 1
    return bytes(data)


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[bytearray], bytes]:
    def edit(data: bytearray) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(data[8 + length :])

    return edit


def _receipt(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        receipt = json.loads(header["__metadata__"]["omnifp4"])
        header["__metadata__"]["omnifp4"] = json.dumps(receipt | values)

    return change


def _swapped_banks(header: dict[str, Any]) -> None:
    index = json.loads(header["__metadata__"]["index"])
    index["weights"][f"{LAYER}.self_attn.q_proj.weight"] = f"{LAYER}.self_attn.o_proj"
    header["__metadata__"]["index"] = json.dumps(index)


def _other_form(header: dict[str, Any]) -> None:
    info = header[f"{LAYER}.self_attn.o_proj.routed.square_mean"]
    info["shape"] = [1, info["shape"][1] // 2, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_flip, "damaged: tensor .* is not what was written"),
        (lambda data: bytes(data[:-100]), "truncated"),
        (lambda data: bytes(data[:4]), "truncated"),
        (lambda _: b"not a safetensors file at all", "header length"),
        (_edit(lambda header: header["__metadata__"].clear()), "no statistics file: it lacks the receipt"),
        (_edit(_receipt(statistics_version=1)), "statistics of version 1; this omnifp4 reads 2"),
        (_edit(_receipt(least_tokens=0)), "its header is not what was written"),
        (_edit(_swapped_banks), "its header is not what was written"),
        (_edit(_other_form), "its header is not what was written"),
        (_edit(_receipt(surprise=1)), "its receipt cannot be read"),
        (_edit(_receipt(tensors={})), "is not of a statistics file"),
        (_edit(lambda header: header["__metadata__"].update(index="{}")), "its index cannot be read"),
        (_edit(lambda header: header["__metadata__"].update(index='{"weights":{"a":"b"},"experts":{}}')), "missing or of"),
    ],
)  # fmt: skip
def test_a_wrong_file(captured: tuple[Path, Any], tmp_path: Path, change: Any, told: str) -> None:
    from omnifp4.calibration.statistics import open_statistics

    path = tmp_path / "statistics"
    shutil.copy(captured[0], path)
    _changed(path, change)
    with pytest.raises(OmniFP4Error, match=told) as error:
        open_statistics(path)
    assert "\n" not in str(error.value)


def test_statistics_of_another_model(captured: tuple[Path, Any], tiny_omni: Path, tmp_path: Path) -> None:
    from omnifp4.calibration.statistics import open_statistics

    # The same shapes, other weights; and the same weights in several shards.
    other = write_tiny_omni(tmp_path / "other", seed=1)
    cut = write_tiny_omni(tmp_path / "cut", seed=0, shard_bytes=2_000_000)
    assert len(list(cut.glob("*.safetensors"))) > 1
    open_statistics(captured[0], tiny_omni).close()
    open_statistics(captured[0], cut).close()
    with pytest.raises(OmniFP4Error, match="statistics of another model"):
        open_statistics(captured[0], other)
    with pytest.raises(OmniFP4Error, match="cannot be opened"):
        open_statistics(tmp_path / "missing")
    with pytest.raises(OmniFP4Error, match=r"cut: is no file \(omnifp4 calibrate"):
        open_statistics(cut)


@pytest.mark.parametrize("part", ["layers.1.self_attn.v_proj", "layers.2.mlp.gate", "audio_tower.layers.0.fc2"])
def test_a_finetune_of_one_matrix_is_another_model(tiny_omni: Path, tmp_path: Path, part: str) -> None:
    """Also where experts are so many that a sample by name would hit nothing but these."""
    from omnifp4.calibration import fingerprint
    from omnifp4.checkpoint.folder import open_checkpoint

    before = open_checkpoint(tiny_omni)
    shutil.copytree(tiny_omni, tmp_path / "tuned")
    entry = next(one for name, one in before.tensors.items() if f"{part}.weight" in name)
    with (tmp_path / "tuned" / entry.shard).open("r+b") as file:
        file.seek(entry.begin)
        file.write(bytes(64))
    after = open_checkpoint(tmp_path / "tuned")
    assert fingerprint.model_fingerprint(after) != fingerprint.model_fingerprint(before)
    experts = [f"layers.{layer}.mlp.experts.{number}.up_proj.weight" for layer in range(3) for number in range(8)]
    names = list(fingerprint._sampled(["norm.weight", *experts]))
    assert names == ["norm.weight", *(f"layers.{one}.mlp.experts.{one}.up_proj.weight" for one in range(3))]
