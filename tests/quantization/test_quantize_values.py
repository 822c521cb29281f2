"""Every number that is written: codes, scales, and everything that is left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import omnifp4
from omnifp4.errors import CheckpointError, ProofError
from omnifp4.formats import reference
from omnifp4.formats.nvfp4 import NVFP4Tensor, ScaleRule
from omnifp4.models import layout_for
from omnifp4.quantization import work
from small_checkpoints import (
    LLAMA,
    QWEN3_MOE,
    QWEN3_VL_MOE,
    Tensor,
    Tensors,
    as_type,
    file_bytes,
    folder_bytes,
    from_values,
    fused,
    linear_names,
    random_tensors,
    read_tensors,
    write_checkpoint,
)

SUFFIXES = {
    "modelopt": (".weight", ".weight_scale", ".weight_scale_2"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_global_scale"),
}
KINDS = ("llama", "qwen3_moe", "qwen3_vl_moe_transposed", "bert", "tiny_omni")


def quantize(folder: Path, out: Path, **options: Any) -> Tensors:
    """What is written, without the proof, which other tests run."""
    omnifp4.quantize(folder, out, check=False, threads=options.pop("threads", 1), **options)
    return read_tensors(out)


def encoded(tensors: Tensors, name: str, output_format: str = "modelopt") -> NVFP4Tensor:
    """A linear as it stands in an artifact."""
    module = name.removesuffix(".weight")
    packed, block_scale, tensor_scale = (tensors[module + suffix] for suffix in SUFFIXES[output_format])
    assert (packed.dtype, block_scale.dtype, tensor_scale.dtype) == ("U8", "F8_E4M3", "F32")
    assert tensor_scale.bits.shape == (() if output_format == "modelopt" else (1,))
    scale = np.float32(tensor_scale.bits.reshape(-1)[0])
    if output_format == "compressed-tensors":
        scale = np.float32(1) / scale
    return NVFP4Tensor(packed.bits, block_scale.bits, scale)


@pytest.fixture(scope="module")
def written(
    small_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Any, Tensors]]:
    """Receipt and tensors of each kind by rule."""
    home = tmp_path_factory.mktemp("written")
    made = {}
    for kind in KINDS:
        for rule in ScaleRule:
            out = home / f"{kind}-{rule}"
            receipt = omnifp4.quantize(small_folders[kind], out, rule=rule.value, check=False, threads=1)
            made[kind, rule.value] = receipt, read_tensors(out)
    return made


def wide_values(small_tensors: dict[str, Tensors], tiny_omni: Path, kind: str) -> Tensors:
    """The source's tensors, one for each expert and projection."""
    return read_tensors(tiny_omni) if kind == "tiny_omni" else small_tensors[kind.removesuffix("_transposed")]


@pytest.mark.parametrize("rule", list(ScaleRule))
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_what_the_reference_makes_of_it(
    written: dict[tuple[str, str], tuple[Any, Tensors]],
    small_tensors: dict[str, Tensors],
    tiny_omni: Path,
    kind: str,
    rule: ScaleRule,
) -> None:
    receipt, tensors = written[kind, rule.value]
    source = wide_values(small_tensors, tiny_omni, kind)
    blocks = other_scales = 0
    for name, told in receipt.decisions.items():
        weight, found = source[name].values, encoded(tensors, name)
        codes = reference.encode_codes(weight, found.block_scale, found.tensor_scale)
        np.testing.assert_array_equal(reference.unpack(found.packed), codes, err_msg=name)
        scales = reference.choose_block_scales(weight, found.tensor_scale, rule)
        other_scales += int((scales != found.block_scale).sum())
        blocks += scales.size
        error = reference.relative_squared_error(weight, reference.decode(found))
        assert told == pytest.approx(error, rel=1e-3), name
    assert blocks > 1000
    # Candidates that err alike to the last bits of float32 may be ranked otherwise.
    assert other_scales <= (0 if rule is ScaleRule.MAX else blocks // 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_share_the_tensor_scale_of_their_largest_weight(
    written: dict[tuple[str, str], tuple[Any, Tensors]],
    small_tensors: dict[str, Tensors],
    small_folders: dict[str, Path],
    tiny_omni: Path,
    kind: str,
) -> None:
    config = json.loads((small_folders[kind] / "config.json").read_text())
    source = wide_values(small_tensors, tiny_omni, kind)
    for rule in ScaleRule:
        receipt, tensors = written[kind, rule.value]
        groups = {key: [spec.name for spec in specs] for key, specs in layout_for(config).scale_groups.items()}
        grouped = {name for names in groups.values() for name in names}
        groups |= {name: [name] for name in receipt.decisions if name not in grouped}
        shared = 0
        for names in groups.values():
            if names[0] not in receipt.decisions:
                continue
            amax = max(float(np.abs(source[name].values).max()) for name in names)
            expected = reference.tensor_scale_for(amax, rule)
            assert {encoded(tensors, name).tensor_scale.tobytes() for name in names} == {expected.tobytes()}, names
            shared += len(names) > 1
        assert shared or kind == "bert"


@pytest.mark.parametrize("output_format", ["modelopt", "compressed-tensors", "fake-quant"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_quantized_is_the_same_bit_by_bit(
    small_folders: dict[str, Path], tmp_path: Path, kind: str, output_format: str
) -> None:
    tensors = quantize(small_folders[kind], tmp_path / "out", format=output_format)
    receipt = omnifp4.plan(small_folders[kind], format=output_format)
    source = read_tensors(small_folders[kind])
    quantized = {name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")}
    same = [name for name in source if name in tensors and name not in quantized]
    if output_format != "fake-quant":
        assert all(tensors[name].same_as(source[name]) for name in same)
        wide = sum(source[name].bits.size for name in same)
        assert wide == receipt.parameters - receipt.fp4_parameters
    else:
        differing = sum(source[name].bits.size for name in same if not tensors[name].same_as(source[name]))
        assert differing <= receipt.fp4_parameters


def test_both_dialects_hold_the_same_codes_and_scales(small_folders: dict[str, Path], tmp_path: Path) -> None:
    ours = quantize(small_folders["qwen3_moe"], tmp_path / "modelopt")
    theirs = quantize(small_folders["qwen3_moe"], tmp_path / "ct", format="compressed-tensors")
    names = linear_names(QWEN3_MOE, "thinker.attention", "thinker.experts")
    assert len(names) == 2 * (4 + 3 * 4)
    for name in names:
        one, two = encoded(ours, name), encoded(theirs, name, "compressed-tensors")
        assert one.packed.tobytes() == two.packed.tobytes()
        assert one.block_scale.tobytes() == two.block_scale.tobytes()
        assert one.tensor_scale == two.tensor_scale  # A power of two, whose reciprocal is exact.


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_fake_quant_holds_the_decoded_values_in_the_source_s_type(
    small_tensors: dict[str, Tensors], tmp_path: Path, dtype: str
) -> None:
    source = as_type(small_tensors["llama"], dtype)
    folder = write_checkpoint(tmp_path / "source", LLAMA, source)
    fake = quantize(folder, tmp_path / "fake", format="fake-quant")
    real = quantize(folder, tmp_path / "real")
    assert {name: (t.dtype, t.bits.shape) for name, t in fake.items()} == {
        name: (t.dtype, t.bits.shape) for name, t in source.items()
    }
    names = linear_names(LLAMA, "thinker.attention", "thinker.mlp")
    for name in names:
        decoded = from_values(reference.decode(encoded(real, name)), dtype)
        assert fake[name].same_as(decoded), name
        assert not fake[name].same_as(source[name])


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_wider_sources_are_encoded_from_their_own_values(
    small_tensors: dict[str, Tensors], tmp_path: Path, dtype: str
) -> None:
    generator = np.random.default_rng(5)
    exact = as_type(small_tensors["llama"], dtype)
    # Values that BF16 does not have.
    exact = {
        name: from_values(tensor.values * (1 + generator.normal(0, 1e-3, tensor.bits.shape)), dtype)
        for name, tensor in exact.items()
    }
    tensors = quantize(write_checkpoint(tmp_path / "source", LLAMA, exact), tmp_path / "out")
    for name in linear_names(LLAMA, "thinker.attention", "thinker.mlp"):
        found = encoded(tensors, name)
        codes = reference.encode_codes(exact[name].values, found.block_scale, found.tensor_scale)
        np.testing.assert_array_equal(reference.unpack(found.packed), codes)
    assert tensors["model.norm.weight"].same_as(exact["model.norm.weight"])


def test_f16_near_its_largest_value_does_not_become_infinite(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    source = as_type(small_tensors["llama"], "F16")
    for name in linear_names(LLAMA, "thinker.attention"):
        source[name] = from_values(np.full(source[name].bits.shape, 65504.0), "F16")
        source[name].bits[:, ::5] = -65504.0
        source[name].bits[:, 1::3] *= np.float16(0.7)
    folder = write_checkpoint(tmp_path / "source", LLAMA, source)
    for rule in ScaleRule:
        fake = quantize(folder, tmp_path / rule, format="fake-quant", rule=rule.value)
        assert all(np.isfinite(tensor.values).all() for tensor in fake.values())


@pytest.mark.parametrize("output_format", ["modelopt", "compressed-tensors"])
def test_fused_experts_give_the_artifact_of_separate_ones(
    small_tensors: dict[str, Tensors], tmp_path: Path, output_format: str
) -> None:
    made = {}
    for kind, tensors in {
        "separate": small_tensors["qwen3_vl_moe"],
        "fused": fused(QWEN3_VL_MOE, small_tensors["qwen3_vl_moe"], transposed=False),
        "transposed": fused(QWEN3_VL_MOE, small_tensors["qwen3_vl_moe"], transposed=True),
    }.items():
        folder = write_checkpoint(tmp_path / kind, QWEN3_VL_MOE, tensors, shards=3)
        omnifp4.quantize(folder, tmp_path / f"{kind}-out", format=output_format, check=False)
        made[kind] = folder_bytes(tmp_path / f"{kind}-out")
    for kind in ("fused", "transposed"):
        for file in ("model.safetensors", "config.json"):
            assert made[kind][file] == made["separate"][file], (kind, file)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fake_quant_keeps_the_form_that_loaders_of_the_model_know(
    small_tensors: dict[str, Tensors], tmp_path: Path, transposed: bool, dtype: str
) -> None:
    separate = as_type(small_tensors["qwen3_vl_moe"], dtype)
    alone = quantize(
        write_checkpoint(tmp_path / "separate", QWEN3_VL_MOE, separate), tmp_path / "alone", format="fake-quant"
    )
    whole = fused(QWEN3_VL_MOE, separate, transposed=transposed)
    folder = write_checkpoint(tmp_path / "fused", QWEN3_VL_MOE, whole, shards=2)
    receipt = omnifp4.quantize(folder, tmp_path / "whole", format="fake-quant", threads=2)
    found, wanted = read_tensors(tmp_path / "whole"), fused(QWEN3_VL_MOE, alone, transposed=transposed)
    assert found.keys() == wanted.keys() == whole.keys()
    assert all(found[name].same_as(wanted[name]) for name in wanted)
    assert set(receipt.decisions) == set(linear_names(QWEN3_VL_MOE, "thinker.attention", "thinker.experts"))
    proof = omnifp4.verify(tmp_path / "whole", against=folder)
    assert proof.verdict == "pass", proof
    assert proof.relative_squared_error == pytest.approx(receipt.relative_squared_error, rel=0.02)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fused_expert_that_was_not_rounded_is_found(
    small_tensors: dict[str, Tensors], tmp_path: Path, transposed: bool
) -> None:
    whole = fused(QWEN3_VL_MOE, small_tensors["qwen3_vl_moe"], transposed=transposed)
    folder = write_checkpoint(tmp_path / "source", QWEN3_VL_MOE, whole)
    fake = quantize(folder, tmp_path / "fake", format="fake-quant")
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    bits = np.array(fake[name].bits)
    bits[2] = whole[name].bits[2]
    (tmp_path / "fake" / "model.safetensors").write_bytes(file_bytes(fake | {name: Tensor("BF16", bits)}))
    proof = omnifp4.verify(tmp_path / "fake")
    check = next(check for check in proof.checks if check.name == "fp4.fake")
    assert check.verdict == "fail"
    assert check.finding_count == 1
    assert "layers.1.mlp.experts.2.down_proj.weight: " in check.findings[0]


def test_experts_that_stay_wide_stay_fused(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    whole = fused(QWEN3_MOE, small_tensors["qwen3_moe"], transposed=False)
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, whole)
    tensors = quantize(folder, tmp_path / "out", components=["thinker.experts=bf16"])
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        assert tensors[name].same_as(whole[name])
    assert "model.layers.1.self_attn.q_proj.weight_scale_2" in tensors


def test_the_bytes_do_not_depend_on_the_number_of_threads(tiny_omni: Path, tmp_path: Path) -> None:
    made = []
    for threads in (1, 2, 7):
        quantize(tiny_omni, tmp_path / str(threads), threads=threads, max_shard_bytes=2_000_000)
        files = folder_bytes(tmp_path / str(threads))
        # The receipt and the card tell time and memory.
        made.append({name: data for name, data in files.items() if name not in {"omnifp4.json", "README.md"}})
    assert made[0] == made[1] == made[2]
    assert sum(name.endswith(".safetensors") for name in made[0]) > 2


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("output_format", ["modelopt", "fake-quant"])
def test_large_tensors_are_done_in_pieces_with_equal_bytes(
    small_tensors: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, output_format: str
) -> None:
    tensors = as_type(small_tensors["qwen3_vl_moe"], dtype)
    sources = {
        "separate": tensors,
        "fused": fused(QWEN3_VL_MOE, tensors, transposed=False),
        "transposed": fused(QWEN3_VL_MOE, tensors, transposed=True),
    }
    for kind, content in sources.items():
        write_checkpoint(tmp_path / kind, QWEN3_VL_MOE, content)
    whole = {kind: quantize(tmp_path / kind, tmp_path / f"{kind}-whole", format=output_format) for kind in sources}
    row = 64 * tensors["lm_head.weight"].bits.itemsize
    for chunk in (4, 5 * row + 4):
        monkeypatch.setattr(work, "HOLD_BYTES", 1)
        # A piece of a wide tensor ends between two values; rows are never cut.
        monkeypatch.setattr(work, "CHUNK_BYTES", chunk)
        for kind in sources:
            pieces = quantize(tmp_path / kind, tmp_path / f"{kind}-{chunk}", format=output_format)
            assert pieces.keys() == whole[kind].keys()
            assert all(pieces[name].same_as(tensor) for name, tensor in whole[kind].items()), (kind, chunk)


def test_buffers_that_loaders_compute_anew_are_copied(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": Tensor("F32", np.linspace(0, 1, 8, dtype=np.float32)),
        "model.rotary_emb.inv_freq": Tensor("F32", np.linspace(1, 0, 8, dtype=np.float32)),
    }
    folder = write_checkpoint(tmp_path / "source", LLAMA, small_tensors["llama"] | buffers)
    tensors = quantize(folder, tmp_path / "out")
    assert all(tensors[name].same_as(buffer) for name, buffer in buffers.items())
    assert omnifp4.plan(folder).weight_bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_widths_that_are_no_multiple_of_16_stay_wide_and_are_told(tmp_path: Path) -> None:
    config = LLAMA | {"intermediate_size": 72}
    source = random_tensors(tmp_path, config)
    folder = write_checkpoint(tmp_path / "source", config, source)
    receipt = omnifp4.quantize(folder, tmp_path / "out")  # The proof passes.
    tensors = read_tensors(tmp_path / "out")
    for layer in range(2):
        down = f"model.layers.{layer}.mlp.down_proj"
        assert tensors[f"{down}.weight"].same_as(source[f"{down}.weight"])
        assert down in receipt.ignore
        assert receipt.left_out[f"{down}.weight"] == "width 72 is not a multiple of 16"
        assert f"{down}.weight" in (tmp_path / "out" / "README.md").read_text()
        assert tensors[f"model.layers.{layer}.mlp.up_proj.weight"].dtype == "U8"


def set_values(source: Tensors, name: str, values: npt.NDArray[np.float32]) -> None:
    source[name] = from_values(np.broadcast_to(values, source[name].bits.shape), source[name].dtype)


def test_weights_of_every_awkward_kind(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    source = as_type(small_tensors["qwen3_moe"], "F32")
    expert = "model.layers.0.mlp.experts.{}.{}_proj.weight"
    zero, huge, tiny = expert.format(0, "gate"), expert.format(1, "down"), expert.format(2, "down")
    set_values(source, zero, np.float32(0))
    set_values(source, expert.format(0, "up"), np.float32(-0.0))
    source[huge].bits[3, 5] = np.float32(2.0) ** 100
    source[tiny].bits[...] *= np.float32(2.0) ** -140  # Denormal in float32.
    source[expert.format(3, "down")].bits[0, :16] = 0
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, source)
    for rule in ScaleRule:
        receipt = omnifp4.quantize(folder, tmp_path / rule, rule=rule.value, check=False)
        tensors = read_tensors(tmp_path / rule)
        for name in linear_names(QWEN3_MOE, "thinker.attention", "thinker.experts"):
            found = encoded(tensors, name)
            scales = tensors[name.removesuffix(".weight") + ".weight_scale"].values
            assert np.isfinite(found.tensor_scale), name
            assert found.tensor_scale > 0, name
            assert np.isfinite(scales).all(), name
            assert (scales > 0).all(), name
            assert np.isfinite(reference.decode(found)).all(), name
        assert not reference.decode(encoded(tensors, zero)).any()
        assert receipt.decisions[zero] == 0.0
        assert reference.decode(encoded(tensors, huge))[3, 5] == pytest.approx(2.0**100, rel=0.13)
        assert receipt.decisions[huge] < 0.02
        assert 0 <= receipt.decisions[tiny] <= 1.0


def test_one_weight_far_above_the_others_passes_the_proof(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    source = as_type(small_tensors["qwen3_moe"], "F32")
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    source[name].bits[3, 5] = 100.0
    omnifp4.quantize(write_checkpoint(tmp_path / "source", QWEN3_MOE, source), tmp_path / "out")
    assert reference.decode(encoded(read_tensors(tmp_path / "out"), name))[3, 5] == pytest.approx(100, rel=0.13)


def test_a_source_of_absurd_weights_is_named_and_made_only_unproved(
    small_tensors: dict[str, Tensors], tmp_path: Path
) -> None:
    source = as_type(small_tensors["qwen3_moe"], "F32")
    source["model.layers.1.mlp.experts.1.down_proj.weight"].bits[3, 5] = 1e20
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, source)
    with pytest.raises(ProofError, match=r"no sane size: model\.layers\.1\.mlp\.experts\.1\.down_proj.*--no-check"):
        omnifp4.quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    omnifp4.quantize(folder, tmp_path / "out", resume=True, check=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_weight_too_large_for_the_format_is_named(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    source = as_type(small_tensors["qwen3_moe"], "F32")
    source["model.layers.1.self_attn.k_proj.weight"].bits[3, 5] = 3e38
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, source)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor 'model\.layers\.1\.self_attn\.k_proj\.weight'.*3\.0"
    ):
        omnifp4.quantize(folder, tmp_path / "out")


def test_an_expert_that_is_all_zeros_has_scales_like_any_other(
    small_tensors: dict[str, Tensors], tmp_path: Path
) -> None:
    source = dict(small_tensors["qwen3_moe"])
    for name in linear_names(QWEN3_MOE, "thinker.experts"):
        if ".experts.2." in name:
            set_values(source, name, np.float32(0))
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, source)
    omnifp4.quantize(folder, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    for name in linear_names(QWEN3_MOE, "thinker.experts"):
        module = name.removesuffix(".weight")
        assert tensors[f"{module}.weight_scale_2"].bits > 0
        assert (tensors[f"{module}.weight_scale"].values > 0).all()


def test_resuming_nothing_is_a_plain_run(small_folders: dict[str, Path], tmp_path: Path) -> None:
    one = quantize(small_folders["llama"], tmp_path / "one", resume=True)
    two = quantize(small_folders["llama"], tmp_path / "two")
    assert all(one[name].same_as(two[name]) for name in one.keys() | two.keys())
