"""The artifact beside its weights: config, index, side files, receipt, model card."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

import omnifp4
from omnifp4.checkpoint import side_files as side_files_module
from omnifp4.checkpoint.fingerprint import file_stamps, headers_sha256
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.side_files import copy_side_files, side_file_bytes, side_files
from omnifp4.errors import CheckpointError
from omnifp4.receipt.quantization import QuantizationReceipt
from small_checkpoints import LLAMA, QWEN3_MOE, Tensors, folder_bytes, read_header, read_tensors, write_checkpoint


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def source(tiny_omni: Path, tmp_path: Path) -> Path:
    """A tiny omni checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_omni, tmp_path / "source"))


def test_the_modelopt_config_stands_where_engines_look(tiny_omni: Path, tiny_artifact: Path) -> None:
    before, after = read_json(tiny_omni / "config.json"), read_json(tiny_artifact / "config.json")
    claim = after.pop("quantization_config")
    assert after == before
    assert (claim["quant_method"], claim["quant_algo"]) == ("modelopt", "W4A16_NVFP4")
    group = claim["config_groups"]["group_0"]
    assert group["weights"] == {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    assert group["input_activations"] is None
    assert not (tiny_artifact / "hf_quant_config.json").exists()
    wide = ["lm_head", "thinker.lm_head", "thinker.visual", "thinker.audio_tower", "talker", "code2wav"]
    for module in wide + [f"thinker.model.layers.{layer}.mlp.gate" for layer in range(4)]:
        assert any(entry.removesuffix("*") == module for entry in claim["ignore"]), module
    assert claim["ignore"] == list(read_json(tiny_artifact / "omnifp4.json")["ignore"])


def test_the_compressed_tensors_config(tiny_omni: Path, tmp_path: Path) -> None:
    omnifp4.quantize(tiny_omni, tmp_path / "out", format="compressed-tensors")
    claim = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert claim["quant_method"] == "compressed-tensors"
    assert (claim["format"], claim["quantization_status"]) == ("nvfp4-pack-quantized", "compressed")
    weights = claim["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["type"], weights["strategy"]) == (4, "float", "tensor_group")
    assert (weights["group_size"], weights["symmetric"]) == (16, True)
    assert claim["config_groups"]["group_0"]["input_activations"] is None
    assert claim["ignore"]


def test_fake_quant_claims_nothing(tiny_omni: Path, tmp_path: Path) -> None:
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out", format="fake-quant")
    assert read_json(tmp_path / "out" / "config.json") == read_json(tiny_omni / "config.json")
    assert receipt.ignore == ()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nothing shrinks" in card
    assert "smaller" not in card


def test_an_old_quantization_config_over_wide_weights_is_replaced(
    small_tensors: dict[str, Tensors], tmp_path: Path
) -> None:
    old = {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["x"]}}
    folder = write_checkpoint(tmp_path / "source", LLAMA | old, small_tensors["llama"])
    omnifp4.quantize(folder, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["quant_method"] == "modelopt"
    omnifp4.quantize(folder, tmp_path / "fake", format="fake-quant")
    assert "quantization_config" not in read_json(tmp_path / "fake" / "config.json")


def test_index_and_shards_agree(tiny_omni: Path, tmp_path: Path) -> None:
    receipt = omnifp4.quantize(tiny_omni, tmp_path / "out", max_shard_bytes=2_000_000)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    found: dict[str, str] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        header, _ = read_header(path)
        found |= dict.fromkeys(header, path.name)
        # The three tensors of a linear, and whatever shares its scale, need no second file.
        assert path.stat().st_size < 2_200_000
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.bits.nbytes for t in read_tensors(tmp_path / "out").values())
    assert set(receipt.shards) == set(found.values())
    for name, shard in found.items():
        if name.endswith(".weight_scale"):
            assert found[name.removesuffix("_scale")] == found[f"{name}_2"] == shard


def test_a_single_shard_has_no_index(tiny_artifact: Path) -> None:
    assert [path.name for path in tiny_artifact.glob("*.safetensors*")] == ["model.safetensors"]


def test_everything_that_users_of_the_model_need_goes_along(tiny_omni: Path, tiny_artifact: Path) -> None:
    rewritten = {"config.json", "model.safetensors", "README.md", "omnifp4.json"}
    before, after = folder_bytes(tiny_omni), folder_bytes(tiny_artifact)
    assert before.keys() | rewritten == after.keys()
    for name in before.keys() - rewritten:
        assert after[name] == before[name]
    assert {"chat_template.jinja", "generation_config.json", "preprocessor_config.json", "vocab.json"} <= after.keys()


def test_tokenizer_and_processor_load_from_the_artifact(tiny_artifact: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_artifact, local_files_only=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text.startswith("<|im_start|>user\nhello<|im_end|>")
    config = transformers.AutoConfig.from_pretrained(tiny_artifact, local_files_only=True)
    assert config.quantization_config["quant_method"] == "modelopt"


def test_side_files_subfolders_and_links(source: Path, tmp_path: Path) -> None:
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    (source / ".gitattributes").write_text("x")
    (source / "LICENSE").write_text("licence")
    (source / "README.md").write_text("the source's card")
    (source / "linked.txt").symlink_to("LICENSE")
    (source / "pytorch_model.bin").write_bytes(b"0" * 100)
    (source / "spk_dict.pt").write_bytes(b"voices")
    (source / "nowhere.txt").symlink_to("gone.txt")
    omnifp4.quantize(source, tmp_path / "out")
    out = folder_bytes(tmp_path / "out")
    assert out["1_Pooling/config.json"] == b"{}"
    assert out["LICENSE"] == out["linked.txt"] == b"licence"
    assert not (tmp_path / "out" / "linked.txt").is_symlink()
    assert out["README.source.md"] == b"the source's card"
    assert b"nvfp4" in out["README.md"]
    assert out["spk_dict.pt"] == b"voices"
    assert not {".gitattributes", ".git/config", "pytorch_model.bin", "nowhere.txt"} & out.keys()


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "README.md"])
def test_a_link_out_of_the_source_is_refused_before_work(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=rf"{name}: a link that leads out of the checkpoint"):
        omnifp4.quantize(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_links_of_the_hub_s_cache_are_followed_and_the_model_keeps_its_name(tiny_omni: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Some--Omni-Model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(tiny_omni.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    receipt = omnifp4.quantize(snapshot, tmp_path / "out")
    assert (receipt.source.model, receipt.source.revision) == ("Some/Omni-Model", commit)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "Some/Omni-Model"\nbase_model_relation: quantized\n' in card
    assert commit in card
    assert (tmp_path / "out" / "vocab.json").read_bytes() == (tiny_omni / "vocab.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_side_file_of_absurd_size_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files_module, "SIDE_FILE_LIMIT_BYTES", 100_000)
    (source / "dump.dat").write_bytes(bytes(100_001))
    with pytest.raises(CheckpointError, match=r"dump\.dat: 100001 bytes"):
        omnifp4.quantize(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_side_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b" / "c").mkdir(parents=True)
    for name in ("z.json", "a.txt", "b/c/deep.txt", "config.json", "omnifp4.json", "x.safetensors", "b/config.json"):
        (folder / name).write_text(name)
    names = [str(path) for path in side_files(folder)]
    assert names == ["a.txt", "z.json", "b/config.json", "b/c/deep.txt"]
    assert side_file_bytes(folder) == sum(map(len, names))
    target = tmp_path / "target"
    target.mkdir()
    assert copy_side_files(folder, target) == names
    assert folder_bytes(target) == {name: name.encode() for name in names}


def test_a_torn_copy_of_the_source_s_card_is_written_anew(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "README.md").write_text("the whole card")
    (target / "README.source.md").write_text("the who")
    assert copy_side_files(source, target) == ["README.source.md"]
    assert (target / "README.source.md").read_text() == "the whole card"


def test_the_receipt_records_what_was_done(tiny_omni: Path, tmp_path: Path) -> None:
    receipt = omnifp4.quantize(
        tiny_omni, tmp_path / "out", recipe="nvfp4-mlp", rule="four-over-six", components=["talker.attention=nvfp4"]
    )
    text = (tmp_path / "out" / "omnifp4.json").read_text()
    assert QuantizationReceipt.model_validate_json(text) == receipt
    assert str(tmp_path) not in text
    assert str(tiny_omni.parent) not in text
    assert (receipt.receipt, receipt.version, receipt.recipe, receipt.recipe_version) == (
        "quantization", 1, "nvfp4-mlp", 1,
    )  # fmt: skip
    assert (receipt.rule, receipt.overrides) == ("four-over-six", {"talker.attention": "nvfp4"})
    assert receipt.source.model == tiny_omni.name
    assert receipt.source.headers_sha256 == headers_sha256(open_checkpoint(tiny_omni))
    assert receipt.environment.python
    assert receipt.seconds > 0
    assert 50_000_000 < receipt.peak_memory_bytes < 4_000_000_000
    assert receipt.threads >= 1
    tensors = read_tensors(tmp_path / "out")
    assert receipt.tensors == {name: zlib.crc32(tensor.bits.tobytes()) for name, tensor in tensors.items()}
    assert set(receipt.decisions) == {name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")}
    assert set(receipt.errors) == {"thinker.experts", "talker.attention"}
    for component, error in receipt.errors.items():
        assert 0.005 < error.relative_squared_error <= error.worst_relative_squared_error < 0.01
        assert receipt.decisions[error.worst_tensor] == error.worst_relative_squared_error
        assert error.linears == next(row.tensors for row in receipt.components if row.name == component)


def test_the_card_tells_what_was_done_and_measured(tiny_omni: Path, tiny_artifact: Path) -> None:
    card = (tiny_artifact / "README.md").read_text()
    receipt = QuantizationReceipt.model_validate_json((tiny_artifact / "omnifp4.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card  # A folder is no model of the Hub.
    for told in (
        "recipe `nvfp4`", "`modelopt`", "`sweep`", "Weights only", f"{receipt.weight_bytes:,} bytes", receipt.source.headers_sha256,
        "1.34x smaller", "36.0%", f"{receipt.errors['thinker.experts'].relative_squared_error:.2e}",
    ):  # fmt: skip
        assert told in card
    for row in receipt.components:
        assert f"| `{row.name}` | {row.scheme} |" in card
        assert row.reason in card


def test_a_fingerprint_changes_with_names_shapes_config_and_files(
    small_tensors: dict[str, Tensors], tmp_path: Path
) -> None:
    tensors = small_tensors["qwen3_moe"]
    base = open_checkpoint(write_checkpoint(tmp_path / "base", QWEN3_MOE, tensors))
    again = open_checkpoint(write_checkpoint(tmp_path / "again", QWEN3_MOE, tensors))
    assert headers_sha256(base) == headers_sha256(again)
    others = [
        write_checkpoint(tmp_path / "config", QWEN3_MOE | {"rms_norm_eps": 1e-5}, tensors),
        write_checkpoint(tmp_path / "sharded", QWEN3_MOE, tensors, shards=2),
        write_checkpoint(tmp_path / "less", QWEN3_MOE, dict(list(tensors.items())[1:])),
        write_checkpoint(tmp_path / "order", QWEN3_MOE, dict(reversed(tensors.items()))),
    ]
    digests = {headers_sha256(open_checkpoint(folder)) for folder in others}
    assert len(digests | {headers_sha256(base)}) == 5
    stamps = file_stamps(base)
    assert stamps["model.safetensors"][0] == (tmp_path / "base" / "model.safetensors").stat().st_size
    with (tmp_path / "base" / "model.safetensors").open("r+b") as file:
        file.write(file.read(0))
    (tmp_path / "base" / "model.safetensors").touch()
    assert file_stamps(base) != stamps
