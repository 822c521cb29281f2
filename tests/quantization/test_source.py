"""Where on disk the bytes of each logical tensor are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.models import layout_for
from omnifp4.models.source import match_source
from small_checkpoints import (
    QWEN3_MOE,
    QWEN3_VL_MOE,
    Config,
    Tensor,
    Tensors,
    fused,
    random_tensors,
    write_checkpoint,
)


@pytest.mark.parametrize("form", ["separate", "fused", "transposed"])
def test_every_tensor_is_read_as_if_it_stood_alone(
    small_tensors: dict[str, Tensors], tmp_path: Path, form: str
) -> None:
    wanted = small_tensors["qwen3_vl_moe"]
    content = wanted if form == "separate" else fused(QWEN3_VL_MOE, wanted, transposed=form == "transposed")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", QWEN3_VL_MOE, content, shards=2))
    source = match_source(checkpoint)
    assert [tensor.spec.name for tensor in source.tensors] == [spec.name for spec in layout_for(QWEN3_VL_MOE).tensors]
    with CheckpointReader(checkpoint) as reader:
        for tensor in source.tensors:
            np.testing.assert_array_equal(tensor.read(reader), wanted[tensor.spec.name].bits, err_msg=tensor.spec.name)
            assert tensor.nbytes == wanted[tensor.spec.name].bits.nbytes
            assert tensor.rows_divide == (form != "transposed" or tensor.fused is None)


@pytest.mark.parametrize("form", ["separate", "fused"])
def test_a_range_of_rows(small_tensors: dict[str, Tensors], tmp_path: Path, form: str) -> None:
    wanted = small_tensors["qwen3_moe"]
    content = wanted if form == "separate" else fused(QWEN3_MOE, wanted, transposed=False)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", QWEN3_MOE, content))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensor = next(tensor for tensor in match_source(checkpoint).tensors if tensor.spec.name == name)
    buffer = np.full(10_000, 0xAA, dtype=np.uint8)
    with CheckpointReader(checkpoint) as reader:
        for begin, end in ((0, 48), (0, 1), (47, 48), (5, 17), (9, 9)):
            rows = tensor.read_rows(reader, begin, end, buffer)
            np.testing.assert_array_equal(rows, wanted[name].bits[begin:end])
    assert (buffer[48 * 64 * 2 :] == 0xAA).all()


def test_rows_of_a_transposed_expert_cannot_be_read_alone(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    content = fused(QWEN3_VL_MOE, small_tensors["qwen3_vl_moe"], transposed=True)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", QWEN3_VL_MOE, content))
    tensor = next(tensor for tensor in match_source(checkpoint).tensors if tensor.fused)
    with CheckpointReader(checkpoint) as reader, pytest.raises(ValueError, match="stored transposed"):
        tensor.read_rows(reader, 0, 1, np.empty(1000, np.uint8))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", [32, 64])
def test_square_experts_are_told_apart_by_their_siblings(tmp_path: Path, inner: int, transposed: bool) -> None:
    """Width 64: gate and up of 32 make a square together, a down of 64 is one alone."""
    config: Config = QWEN3_VL_MOE | {"text_config": QWEN3_VL_MOE["text_config"] | {"moe_intermediate_size": inner}}
    wanted = random_tensors(tmp_path, config)
    folder = write_checkpoint(tmp_path / "source", config, fused(config, wanted, transposed=transposed))
    checkpoint = open_checkpoint(folder)
    with CheckpointReader(checkpoint) as reader:
        for tensor in match_source(checkpoint).tensors:
            np.testing.assert_array_equal(tensor.read(reader), wanted[tensor.spec.name].bits, err_msg=tensor.spec.name)


def test_layers_may_differ_in_form(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    wanted = small_tensors["qwen3_moe"]
    whole = fused(QWEN3_MOE, wanted, transposed=False)
    mixed = {name: tensor for name, tensor in whole.items() if "layers.1.mlp.experts" not in name}
    mixed |= {name: tensor for name, tensor in wanted.items() if "layers.1.mlp.experts" in name}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", QWEN3_MOE, mixed))
    with CheckpointReader(checkpoint) as reader:
        for tensor in match_source(checkpoint).tensors:
            np.testing.assert_array_equal(tensor.read(reader), wanted[tensor.spec.name].bits)


def test_a_fused_tensor_without_its_sibling_is_incomplete(small_tensors: dict[str, Tensors], tmp_path: Path) -> None:
    whole = fused(QWEN3_MOE, small_tensors["qwen3_moe"], transposed=False)
    del whole["model.layers.0.mlp.experts.down_proj"]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", QWEN3_MOE, whole))
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.weight' \(and 3 more\) is missing"):
        match_source(checkpoint)


@pytest.mark.parametrize(
    "ending",
    ["weight_scale", "weight_packed", "weight_scale_inv", "qweight", "weight.absmax", "weight_quantizer._amax"],
)
def test_what_others_quantized_is_recognised(small_tensors: dict[str, Tensors], tmp_path: Path, ending: str) -> None:
    extra = {f"model.layers.0.self_attn.q_proj.{ending}": Tensor("U8", np.ones(4, np.uint8))}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source", QWEN3_MOE, small_tensors["qwen3_moe"] | extra))
    with pytest.raises(CheckpointError, match=f"{ending}' shows that it is already quantized"):
        match_source(checkpoint)
