"""FP8, MXFP4 and INT8 in both dialects: forms on disk, groups of the config, and finding them again."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from omnifp4.checkpoint.artifact import find_coded, find_linears, parse_claim
from omnifp4.checkpoint.dialects import COMPRESSED_TENSORS, DIALECTS, MODELOPT, Activations, Dialect
from omnifp4.checkpoint.dialects.coded import codes_from_disk, scale_from_disk
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.errors import RecipeError
from omnifp4.formats import coded
from omnifp4.formats.scheme import Scheme

PRODUCER = {"name": "omnifp4", "version": "0"}
FORMS = [(dialect, scheme) for dialect in DIALECTS.values() for scheme in dialect.coded_forms]
EACH = pytest.mark.parametrize(("dialect", "scheme"), FORMS, ids=[f"{d.name}-{s}" for d, s in FORMS])

LAYERS = [f"thinker.model.layers.{n}" for n in range(3)] + [f"talker.model.layers.{n}" for n in range(2)]
SCHEMES = {
    **{f"{layer}.self_attn.{part}_proj": Scheme.FP8 for layer in LAYERS for part in "qkvo"},
    **{
        f"{layer}.mlp.experts.{expert}.{part}_proj": Scheme.FP8 if layer.startswith("talker") else Scheme.NVFP4
        for layer in LAYERS
        for expert in range(2)
        for part in ("gate", "up", "down")
    },
    "thinker.model.layers.1.self_attn.o_proj": Scheme.INT8,
    "thinker.lm_head": Scheme.MXFP4,
}


def entries(dialect: Dialect, scheme: Scheme) -> dict[str, TensorEntry]:
    stored = dialect.stored("m", (48, 64), Activations.WIDE, scheme)
    return {t.name: TensorEntry(t.name, "a.safetensors", t.dtype, t.shape, 0, 0) for t in stored}


@EACH
def test_what_is_stored_is_found_again(dialect: Dialect, scheme: Scheme) -> None:
    tensors = entries(dialect, scheme)
    (linear,) = find_coded(tensors).values()
    assert (linear.module, linear.scheme, linear.shape) == ("m", scheme, (48, 64))
    assert {entry.name for entry in linear.entries} == tensors.keys()
    assert linear.problems() == []
    assert find_linears(tensors) == {}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_nvfp4_is_taken_for_nothing_else(dialect: Dialect) -> None:
    tensors = entries(dialect, Scheme.NVFP4)
    assert find_coded(tensors) == {}
    assert list(find_linears(tensors)) == ["m"]


@EACH
def test_bytes_there_and_back(dialect: Dialect, scheme: Scheme) -> None:
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    done, form = coded.encode(weight, scheme), dialect.coded_forms[scheme]
    raw, scale = form.codes_on_disk(done.codes), form.scale_on_disk(done.scale)
    sizes = {t.name: t for t in dialect.stored("m", (48, 64), Activations.WIDE, scheme)}
    codes_bytes = {"U8": 1, "F8_E4M3": 1, "I32": 4}[form.codes_dtype]
    assert raw.nbytes == np.prod(sizes["m" + form.codes_suffix].shape) * codes_bytes
    assert (codes_from_disk(raw, form.codes_dtype) == done.codes).all()
    assert (scale_from_disk(scale, form.scale_dtype) == done.scale).all()


def test_integers_are_packed_as_unsigned_words() -> None:
    codes = np.array([[-127, 0, 1, 127]], dtype=np.int8)
    word = COMPRESSED_TENSORS.coded_forms[Scheme.INT8].codes_on_disk(codes).view("<i4")
    assert word.tolist() == [[int.from_bytes(bytes([1, 128, 129, 255]), "little", signed=True)]]


@EACH
def test_wrong_forms_are_told(dialect: Dialect, scheme: Scheme) -> None:
    (linear,) = find_coded(entries(dialect, scheme)).values()
    assert "scale is missing" in replace(linear, scale=None).problems()[0]
    assert linear.scale is not None
    odd = replace(linear.scale, shape=(7,))
    assert "is needed" in replace(linear, scale=odd).problems()[0]
    assert "matrix" in replace(linear, codes=replace(linear.codes, shape=(48,))).problems()[0]


def test_fp8_in_squares_is_another_format() -> None:
    tensors = entries(COMPRESSED_TENSORS, Scheme.FP8)
    squares = tensors | {"m.weight_scale": replace(tensors["m.weight_scale"], shape=(1, 2))}
    assert find_coded(squares) == {}
    assert find_coded(tensors | {"m.weight_scale_inv": tensors["m.weight_scale"]}) == {}


def test_modelopt_has_no_int8() -> None:
    with pytest.raises(RecipeError, match="no form of int8"):
        MODELOPT.stored("m", (48, 64), Activations.WIDE, Scheme.INT8)


def test_mixed_precision_names_every_module() -> None:
    schemes = {module: scheme for module, scheme in SCHEMES.items() if scheme is not Scheme.INT8}
    config = MODELOPT.quantization_config(Activations.WIDE, ["code2wav*"], PRODUCER, schemes)
    assert (config["quant_algo"], config["ignore"]) == ("MIXED_PRECISION", ["code2wav*"])
    said = {"W4A16_NVFP4": Scheme.NVFP4, "FP8_PER_CHANNEL_PER_TOKEN": Scheme.FP8, "MXFP4": Scheme.MXFP4}
    assert {m: said[info["quant_algo"]] for m, info in config["quantized_layers"].items()} == schemes
    sizes = {info["quant_algo"]: info.get("group_size") for info in config["quantized_layers"].values()}
    assert sizes == {"W4A16_NVFP4": 16, "FP8_PER_CHANNEL_PER_TOKEN": None, "MXFP4": 32}


def test_targets_tell_the_groups_apart_under_every_name() -> None:
    config = COMPRESSED_TENSORS.quantization_config(Activations.WIDE, [], PRODUCER, SCHEMES)
    assert config["format"] == "mixed-precision"
    formats = {
        "nvfp4-pack-quantized": Scheme.NVFP4, "float-quantized": Scheme.FP8, "pack-quantized": Scheme.INT8,
        "mxfp4-pack-quantized": Scheme.MXFP4,
    }  # fmt: skip
    for module, scheme in SCHEMES.items():
        names = [module, module.replace("thinker.model.", "language_model.model.").removeprefix("thinker.")]
        names.append(module.replace(".model.", ".language_model.model."))
        for name in names:
            groups = [
                group
                for group in config["config_groups"].values()
                if any(re.match(target.removeprefix("re:"), name) for target in group["targets"])
            ]
            assert [formats[group["format"]] for group in groups] == [scheme], name
            inputs = groups[0]["input_activations"]
            assert (inputs is not None) == (scheme is Scheme.FP8 and ".experts." in module)
            assert inputs is None or (inputs["strategy"], inputs["dynamic"]) == ("token", True)


def test_one_scheme_alone_targets_every_linear() -> None:
    config = COMPRESSED_TENSORS.quantization_config(Activations.WIDE, [], PRODUCER, {"a.b": Scheme.INT8})
    assert config["format"] == "pack-quantized"
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_a_claim_of_several_groups_is_that_of_its_nvfp4_group() -> None:
    schemes = {"a.experts.0.up_proj": Scheme.FP8, "b.c": Scheme.MXFP4, "d.e": Scheme.NVFP4}
    for activations in Activations:
        raw = COMPRESSED_TENSORS.quantization_config(activations, [], PRODUCER, schemes)
        claim = parse_claim(raw, "here")
        assert (claim.activations, claim.group_size) == (activations, 16)
    raw = COMPRESSED_TENSORS.quantization_config(Activations.WIDE, [], PRODUCER, {"a.experts.0.up_proj": Scheme.FP8})
    assert parse_claim(raw, "here").activations is Activations.WIDE
