"""Everything that is wrong with a source or an OUT: one line that names it, exit status 2, and nothing that looks whole."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import nothing_whole, refused, run

import omnifp4
from omnifp4.errors import CheckpointError
from small_checkpoints import QWEN3_MOE, Tensor, Tensors, fused, random_tensors, write_checkpoint

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
NAN = 0x7FC1
INFINITY = 0xFF80


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return random_tensors(tmp_path_factory.mktemp("random"), QWEN3_MOE)


@pytest.fixture(scope="module")
def sound(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right checkpoint in two shards."""
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "source", QWEN3_MOE, tensors, shards=2)


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "source"))


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    if not isinstance(text, bytes):
        text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def put(key: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content[key] = value

    return change


def point_to(shard: str, name: str = EXPERT) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        change_json(source / INDEX, lambda index: index["weight_map"].update({name: shard}) or index)

    return damage


def link_out(source: Path) -> None:
    (source / SHARD).rename(source.parent / "elsewhere.safetensors")
    (source / SHARD).symlink_to(source.parent / "elsewhere.safetensors")


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda source: change_header(source / SHARD, change)


def header_of_first(**changes: Any) -> Callable[[Path], None]:
    return in_header(lambda header: header[first(header)].update(changes))


def doubled(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    name = first(header)
    entry = json.dumps({name: header[name]})[1:-1]
    return (text[:-1] + ", " + entry + "}").encode()


def absurd_length(source: Path) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(struct.pack("<Q", 2**60) + data[8:])


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated shard": (lambda s: os.truncate(s / SHARD, 60_000), [SHARD, "truncated"]),
    "truncated header": (lambda s: os.truncate(s / SHARD, 100), [SHARD, "truncated"]),
    "empty shard": (lambda s: os.truncate(s / SHARD, 0), [SHARD, "truncated"]),
    "bytes after the data": (lambda s: (s / SHARD).open("ab").write(b"12345"), [SHARD, "5 bytes belong to no tensor"]),
    "absurd header": (absurd_length, [SHARD, "header length", "absurd"]),
    "header is no JSON": (in_header(lambda header: b"{not json"), [SHARD, "not valid JSON"]),
    "header is no object": (in_header(lambda header: b"[1, 2]"), [SHARD, "no JSON object"]),
    "header is not UTF-8": (in_header(lambda header: b"\xff\xfe{}"), [SHARD, "not UTF-8"]),
    "header nested deeply": (in_header(lambda header: b"[" * 200_000), [SHARD, "nested too deeply"]),
    "tensor twice": (in_header(doubled), [SHARD, "occurs twice"]),
    "offsets overlap": (header_of_first(data_offsets=[2, 12290]), [SHARD, "tensor"]),
    "negative shape": (header_of_first(shape=[-1, 2]), [SHARD, "shape"]),
    "unknown dtype": (header_of_first(dtype="F7"), [SHARD, "unknown dtype 'F7'"]),
    "missing shard": (lambda s: (s / OTHER).unlink(), [OTHER, "missing"]),
    "shard is a folder": (lambda s: ((s / OTHER).unlink(), (s / OTHER).mkdir()), [OTHER, "no file"]),
    "missing index": (lambda s: (s / INDEX).unlink(), [INDEX, "missing"]),
    "index is no JSON": (lambda s: (s / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "index without map": (lambda s: (s / INDEX).write_text("{}"), [INDEX, "no weight_map"]),
    "index key twice": (lambda s: (s / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), [INDEX, "'a'", "twice"]),
    "index to the wrong shard": (point_to(OTHER, EMBEDDINGS), [INDEX, EMBEDDINGS, f"is in {SHARD}"]),
    "index out of the folder": (point_to("../source/" + SHARD), [INDEX, EXPERT, "no plain file name"]),
    "index to an absolute path": (point_to("/etc/passwd.safetensors"), [INDEX, EXPERT, "no plain file name"]),
    "shard is a link out": (link_out, [SHARD, "link that leads out"]),
    "no config": (lambda s: (s / "config.json").unlink(), ["config.json", "no such file"]),
    "config is no JSON": (lambda s: (s / "config.json").write_text("{'a': 1}"), ["config.json", "not valid JSON"]),
    "config is no object": (lambda s: (s / "config.json").write_text("[]"), ["config.json", "no JSON object"]),
    "config key twice": (lambda s: (s / "config.json").write_text('{"a": 1, "a": 2}'), ["config.json", "'a'", "twice"]),
    "config is a folder": (lambda s: ((s / "config.json").unlink(), (s / "config.json").mkdir()), ["config.json"]),
    "config is binary": (lambda s: (s / "config.json").write_bytes(b"\x00\xff\xfe"), ["config.json", "not UTF-8"]),
    "unknown model_type": (
        lambda s: change_json(s / "config.json", put("model_type", "gpt2")), ["'gpt2'", "qwen3_omni_moe", "llama"],
    ),
    "no model_type": (lambda s: change_json(s / "config.json", lambda c: c.pop("model_type") and c), ["model_type"]),
    "absurd config": (lambda s: change_json(s / "config.json", put("hidden_size", 10**30)), ["hidden_size"]),
    "config of other shapes": (
        lambda s: change_json(s / "config.json", put("moe_intermediate_size", 32)), ["[48, 64]", "[32, 64]", "experts"],
    ),
    "config of more experts": (lambda s: change_json(s / "config.json", put("num_experts", 5)), ["experts.4.", "missing"]),
    "config of fewer layers": (
        lambda s: change_json(s / "config.json", put("num_hidden_layers", 1)), ["model.layers.1.", "no place"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_source_is_refused_in_one_line(source: Path, tmp_path: Path, name: str) -> None:
    damage, told = DAMAGES[name]
    damage(source)
    refused(run("quantize", source, tmp_path / "out"), *told)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model.layers.1.extra.weight": Tensor("BF16", np.ones((2, 2), "<u2"))},
            ["layers.1.extra.weight", "no place"],
        ),
        ({EXPERT: None}, [EXPERT, "missing"]),
        ({EXPERT: Tensor("BF16", np.ones((64, 48), "<u2"))}, [EXPERT, "[64, 48]", "[48, 64]"]),
        ({EXPERT: Tensor("F8_E4M3", np.ones((48, 64), "u1"))}, [EXPERT, "F8_E4M3", "BF16, F16, F32"]),
        ({EXPERT: Tensor("I64", np.ones((48, 64), "<i8"))}, [EXPERT, "I64"]),
        (
            {EXPERT + "_scale": Tensor("F8_E4M3", np.ones((48, 4), "u1"))},
            [EXPERT + "_scale", "already quantized", "omnifp4 verify"],
        ),
        ({"model.layers.0.mlp.experts.gate_up_proj": Tensor("BF16", np.ones((4, 96, 60), "<u2"))}, ["[4, 96, 60]"]),
        ({"model.layers.0.mlp.experts.gate_up_proj": Tensor("BF16", np.ones((4, 96, 64), "<u2"))}, ["twice"]),
    ],
)
def test_wrong_tensors_are_named(
    tensors: Tensors, tmp_path: Path, changes: dict[str, Tensor | None], told: list[str]
) -> None:
    content = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, content)
    refused(run("quantize", folder, tmp_path / "out"), "source", *told)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("bits", [NAN, INFINITY])
@pytest.mark.parametrize("place", ["quantized", "wide", "norm", "fused", "transposed"])
def test_nan_and_infinity_are_named_where_they_are(tensors: Tensors, tmp_path: Path, place: str, bits: int) -> None:
    name = {
        "wide": EMBEDDINGS, "norm": "model.layers.1.self_attn.q_norm.weight",
    }.get(place, EXPERT)  # fmt: skip
    damaged = np.array(tensors[name].bits)
    damaged.reshape(-1)[7] = bits
    content = tensors | {name: Tensor("BF16", damaged)}
    if place in {"fused", "transposed"}:
        content = fused(QWEN3_MOE, content, transposed=False)
    folder = write_checkpoint(tmp_path / "source", QWEN3_MOE, content)
    line = refused(run("quantize", folder, tmp_path / "out"), "model.safetensors", f"'{name}'", "NaN or infinite")
    assert "element 7" in line
    nothing_whole(tmp_path / "out")


def test_an_artifact_is_no_source(tiny_artifact: Path, tmp_path: Path) -> None:
    refused(run("quantize", tiny_artifact, tmp_path / "out"), "already quantized", "convert or repair")
    refused(run("plan", tiny_artifact), "already quantized")


def test_a_model_that_is_a_file_or_nothing(sound: Path, tmp_path: Path) -> None:
    refused(run("quantize", sound / "config.json", tmp_path / "out"), "config.json: no folder")
    refused(run("quantize", "Some/Model", tmp_path / "out"), "Some/Model", "HF_HUB_OFFLINE")
    refused(run("plan", tmp_path), "config.json: no such file")
    for model in (str(tmp_path / "no" / "where"), ""):
        with pytest.raises(CheckpointError, match="neither a local folder nor a Hub id"):
            omnifp4.plan(model)
    assert not list(tmp_path.glob("out*"))


def test_an_out_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("quantize", source, source), "exists already")
    refused(run("quantize", source, source / "out"), "lies inside the source")
    refused(run("quantize", source, tmp_path / "file" / "out"), "Not a directory")
    assert run("quantize", source, tmp_path / "made" / "with" / "parents").returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    refused(run("quantize", source, tmp_path / "closed" / "out"), "Permission denied")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "int4"], "nvfp4-mlp"),
        (["--format", "gguf"], "compressed-tensors"),
        (["--rule", "best"], "four-over-six"),
        (["--component", "thinker.expert=nvfp4"], "thinker.experts"),
        (["--component", "thinker=bf16"], "leaves nothing"),
        (["--max-shard-size", "big"], "'big'"),
        (["--max-shard-size", "9" * 400], "99999"),
        (["--max-shard-size", "0"], "'0'"),
    ],
)
def test_wrong_choices(source: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    refused(run("quantize", source, tmp_path / "out", *arguments), told)
    refused(run("plan", source, *arguments), told)
    assert not list(tmp_path.glob("out*"))


def test_an_artifact_whose_proof_fails_does_not_appear(source: Path, tmp_path: Path) -> None:
    script = tmp_path / "spoiled.py"
    # The encoder is made to write block scales that are NaN.
    script.write_text(
        "from omnifp4.formats import fast_cpu\n"
        "plain = fast_cpu.encode_into\n"
        "def spoiled(raw, dtype, rule, tensor_scale, packed, block_scale, importance=None):\n"
        "    stats = plain(raw, dtype, rule, tensor_scale, packed, block_scale, importance)\n"
        "    block_scale[0, 0] = 0x7F\n"
        "    return stats\n"
        "fast_cpu.encode_into = spoiled\n"
        "from omnifp4.cli.main import run\n"
        "run()\n"
    )
    command = [sys.executable, str(script), "quantize", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(done, "out.partial: failed scales.finite", "please report", status=1)
    assert not (tmp_path / "out").exists()


def test_verify_fails_an_artifact_that_did_not_shrink(source: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    """The failure that users met elsewhere: every calibration sample failed, 1.00x, exit status 0."""
    claim = json.loads((tiny_artifact / "config.json").read_text())["quantization_config"]
    change_json(source / "config.json", put("quantization_config", claim))
    done = run("verify", source, "--json")
    assert done.returncode == 1
    receipt = json.loads(done.stdout)
    assert receipt["verdict"] == "fail"
    failed = {check["name"] for check in receipt["checks"] if check["verdict"] == "fail"}
    assert "fp4.ratio" in failed or "fp4.present" in failed
    assert receipt["compression_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "told"), [("transformers.utils", "transformers"), ("torch", "torch"), ("nonsense", "")]
)
def test_a_library_that_is_not_installed(
    name: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Plain `pip install omnifp4` brings no torch; what else is missing is our own fault, and keeps its traceback."""
    from omnifp4.cli import dataset, main

    def missing() -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(dataset, "hush_libraries", missing)
    monkeypatch.setattr(sys, "argv", ["omnifp4", "dataset", str(tmp_path / "set")])
    with pytest.raises((SystemExit, ModuleNotFoundError)) as end:
        main.run()
    assert isinstance(end.value, SystemExit) is bool(told)
    if told:
        expected = f"error: dataset needs {told}, which is not installed (pip install 'omnifp4[run]')\n"
        assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())
