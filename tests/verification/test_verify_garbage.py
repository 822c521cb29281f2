"""Whatever is wrong with the files, the answer is a verdict or one line: never a traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from verify_artifacts import COMPRESSED, MODELOPT, Artifact, load_folder, quantize

from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.tiny import write_random_checkpoint
from omnifp4.verification import verify

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 32,
    "num_experts": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
GARBAGE: list[Any] = [
    None,
    True,
    -1,
    0,
    16,
    2**70,
    1.5,
    "",
    "x",
    "re:(",
    "NVFP4",
    [],
    ["Linear", 3],
    {},
    {"a": {"b": []}},
]


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(CONFIG, tmp_path_factory.mktemp("small") / "source")


@pytest.fixture(scope="module", params=[MODELOPT, COMPRESSED])
def small(request: pytest.FixtureRequest, small_source: Path) -> Artifact:
    return quantize(load_folder(small_source), request.param, w4a4=True, ignore=["lm_head", "*.mlp.gate"])


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value that can be overwritten."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from nodes(value[key])


def attempt(folder: Path, against: Path | None = None) -> None:
    try:
        verify(folder, against=against, threads=1)
    except OmniFP4Error as error:
        assert "\n" not in str(error)


def test_garbage_in_config(small, small_source, tmp_path):
    rng = random.Random(0)
    folder = small.write(tmp_path / "artifact")
    for _ in range(150):
        config = copy.deepcopy(small.config)
        container, key = rng.choice(list(nodes(config)))
        container[key] = rng.choice(GARBAGE)
        (folder / "config.json").write_text(json.dumps(config))
        attempt(folder, small_source)


def test_garbage_in_a_legacy_file_and_receipt(small, small_source, tmp_path):
    rng = random.Random(1)
    folder = small.write(tmp_path / "artifact")
    legacy = {"producer": {}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    receipt = json.loads(small.receipt(weight_bytes=1, shards={"model.safetensors": 2}, decisions={"x": 1.0}))
    receipt["components"] = [{"name": "thinker.head", "scheme": "nvfp4"}]
    for name, content in (("hf_quant_config.json", legacy), ("omnifp4.json", receipt)):
        for _ in range(60):
            changed = copy.deepcopy(content)
            container, key = rng.choice(list(nodes(changed)))
            container[key] = rng.choice(GARBAGE)
            (folder / name).write_text(json.dumps(changed))
            attempt(folder, small_source)


def test_garbage_in_the_header(small, tmp_path):
    rng = random.Random(2)
    folder = small.write(tmp_path / "artifact")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(8 + length)] = rng.choice(b'0123456789"{}[],:AFU8xz')
        path.write_bytes(damaged)
        attempt(folder)


def test_garbage_in_shapes_and_types(small, small_source, tmp_path):
    """Headers that are right in themselves, but not what an artifact has."""
    rng = random.Random(3)
    for number in range(120):
        artifact = small.copy()
        name = rng.choice(list(artifact.tensors))
        size = len(artifact.tensors[name][2])
        dtype = rng.choice(["U8", "F8_E4M3", "I8", "BF16", "F32", "I64", "BOOL", "F8_E8M0"])
        width = {"BF16": 2, "F32": 4, "I64": 8}.get(dtype, 1)
        count = size // width
        shapes: list[tuple[int, ...]] = [(count,), (1, count), (count, 1), (1, 1, count), (0, 5), (0,)]
        shapes += [(count // 2, 2)] if count % 2 == 0 else []
        shape = rng.choice(shapes)
        artifact.tensors[name] = (dtype, shape, b"" if 0 in shape else artifact.tensors[name][2][: count * width])
        attempt(artifact.write(tmp_path / f"artifact{number}"), small_source if number % 2 else None)


def test_against_another_model(small, tmp_path):
    source = write_random_checkpoint({**CONFIG, "hidden_size": 64, "num_hidden_layers": 2}, tmp_path / "other")
    receipt = verify(small.write(tmp_path / "artifact"), against=source)
    assert receipt.verdict == "fail"


def test_deep_nesting(small, tmp_path):
    folder = small.write(tmp_path / "artifact")
    (folder / "config.json").write_text('{"model_type":"qwen3_moe","x":' + '{"x":' * 900 + "1" + "}" * 901)
    attempt(folder)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError):
        verify(tmp_path / name)
