"""What lies on disk: files, names, shapes, bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_reading import read_bits, read_header, to_float

from omnifp4.errors import ModelError, OutputError
from omnifp4.models import Kind, Part, layout_for
from omnifp4.tiny import tiny_config, write_tiny_omni

EXPECTED_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
}


def test_folder_is_complete_and_small(tiny_folder: Path) -> None:
    assert {path.name for path in tiny_folder.iterdir()} == EXPECTED_FILES
    assert sum(path.stat().st_size for path in tiny_folder.iterdir()) < 12_000_000


def test_names_and_shapes_are_the_layouts(tiny_folder: Path) -> None:
    layout = layout_for(json.loads((tiny_folder / "config.json").read_text()))
    tensors = read_bits(tiny_folder)
    assert {name: bits.shape for name, bits in tensors.items()} == {
        tensor.name: tensor.shape for tensor in layout.tensors if not tensor.optional
    }


def test_every_part_of_the_released_model_is_there() -> None:
    parts = {component.part for component in layout_for(tiny_config()).components}
    assert parts == set(Part)


def test_linears_that_may_be_quantized_fit_the_kernels() -> None:
    kinds = {Kind.ATTENTION, Kind.EXPERTS, Kind.SHARED_EXPERTS}
    for tensor in layout_for(tiny_config()).tensors:
        component = tensor.component
        if tensor.is_linear and component.part in (Part.THINKER, Part.TALKER) and component.kind in kinds:
            outputs, inputs = tensor.shape
            assert (outputs % 64, inputs % 128) == (0, 0), tensor.name


def test_header_is_what_readers_expect(tiny_folder: Path) -> None:
    header, start = read_header(tiny_folder / "model.safetensors")
    assert start % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert start + max(ends) == (tiny_folder / "model.safetensors").stat().st_size


def test_safetensors_itself_reads_it(tiny_folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    layout = layout_for(tiny_config())
    with safetensors.safe_open(tiny_folder / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == {tensor.name for tensor in layout.tensors if not tensor.optional}


def test_weights_are_finite_and_vary(tiny_folder: Path) -> None:
    for name, bits in read_bits(tiny_folder).items():
        values = to_float(bits)
        assert np.isfinite(values).all(), name
        assert values.size == 1 or values.std() > 0, name
        assert (values != 0).all(), name
        if values.ndim == 2 and "shared_expert_gate" not in name:
            assert values.std(axis=1).min() > 0, name


def test_linears_have_heavy_tails_and_outlier_channels(tiny_folder: Path) -> None:
    values = to_float(read_bits(tiny_folder)["thinker.model.layers.0.self_attn.q_proj.weight"])
    channel_stds = values.std(axis=0)
    outliers = channel_stds > 2.5 * np.median(channel_stds)
    assert 1 <= outliers.sum() <= values.shape[1] // 16
    usual = values[:, ~outliers]
    assert usual.std() == pytest.approx(values.shape[1] ** -0.5, rel=0.05)
    kurtosis = ((usual / usual.std()) ** 4).mean()
    assert kurtosis > 4.5, "a normal distribution has 3"


def test_seed_decides_the_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    same = write_tiny_omni(tmp_path / "same", seed=0)
    other = write_tiny_omni(tmp_path / "other", seed=1)
    for name in EXPECTED_FILES:
        assert (same / name).read_bytes() == (tiny_folder / name).read_bytes(), name
    ours, theirs = read_bits(tiny_folder), read_bits(other)
    assert all((ours[name] != theirs[name]).any() for name in ours)


def test_bytes_are_the_same_on_every_machine(tiny_folder: Path) -> None:
    digest = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "58db83b474950bd39b0a7a6898c7388a89b309ca8e0372e1e609da69480373f0"


def test_shards_hold_the_same_tensors(tiny_folder: Path, tmp_path: Path) -> None:
    limit = 3_000_000
    folder = write_tiny_omni(tmp_path / "shards", seed=0, shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    for shard in shards:
        header, start = read_header(folder / shard)
        assert (folder / shard).stat().st_size - start <= limit
        assert all(index["weight_map"][name] == shard for name in header if name != "__metadata__")
    whole, parts = read_bits(tiny_folder), read_bits(folder)
    assert index["weight_map"].keys() == whole.keys() == parts.keys()
    assert index["metadata"]["total_size"] == sum(bits.nbytes for bits in whole.values())
    assert all((whole[name] == parts[name]).all() for name in whole)


@pytest.mark.parametrize("layers", [1, 6])
def test_layers_can_be_chosen(tmp_path: Path, layers: int) -> None:
    folder = write_tiny_omni(tmp_path / "deep", layers=layers)
    config = json.loads((folder / "config.json").read_text())
    assert config["thinker_config"]["text_config"]["num_hidden_layers"] == layers
    assert config["talker_config"]["accept_hidden_layer"] <= layers
    assert layout_for(config).missing(read_bits(folder)) == []


def test_layers_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least one decoder layer, not 0"):
        write_tiny_omni(tmp_path / "none", layers=0)
    assert not (tmp_path / "none").exists()


def test_an_occupied_folder_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny_folder.iterdir()}
    with pytest.raises(OutputError, match="is not empty"):
        write_tiny_omni(tiny_folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in tiny_folder.iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        write_tiny_omni(tmp_path / "file")


def test_quick_and_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from omnifp4.tiny import write_tiny_omni; write_tiny_omni(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'safetensors', 'tokenizers'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tiny")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 3


def test_token_ids_of_the_config_are_the_tokenizers(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    vocabulary = json.loads((tiny_folder / "vocab.json").read_text("utf-8"))
    tokenizer_config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    generation_config = json.loads((tiny_folder / "generation_config.json").read_text())
    ids = {entry["content"]: int(key) for key, entry in tokenizer_config["added_tokens_decoder"].items()}
    thinker, talker = config["thinker_config"], config["talker_config"]
    assert len(vocabulary) + len(ids) == thinker["text_config"]["vocab_size"]
    assert sorted(vocabulary.values()) + sorted(ids.values()) == list(range(len(vocabulary) + len(ids)))
    for role in ("system", "user", "assistant"):
        assert config[f"{role}_token_id"] == vocabulary[role]
    assert thinker["user_token_id"] == vocabulary["user"]
    expected = {
        "im_start_token_id": "<|im_start|>",
        "im_end_token_id": "<|im_end|>",
        "tts_pad_token_id": "<tts_pad>",
        "tts_bos_token_id": "<tts_text_bos>",
        "tts_eos_token_id": "<tts_text_eod>",
    }
    for key, token in expected.items():
        assert config[key] == ids[token], key
    multimodal = {
        "audio_token_id": "<|audio_pad|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "audio_start_token_id": "<|audio_start|>",
        "audio_end_token_id": "<|audio_end|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    for section in (thinker, talker):
        for key, token in multimodal.items():
            # As released, the talker's section has no end of vision.
            if key in section or key != "vision_end_token_id":
                assert section[key] == ids[token], key
    assert generation_config == {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}


def test_speech_sizes_agree_between_talker_and_vocoder() -> None:
    config = tiny_config()
    talker, vocoder = config["talker_config"], config["code2wav_config"]
    predictor = talker["code_predictor_config"]
    assert talker["num_code_groups"] == predictor["num_code_groups"] == vocoder["num_quantizers"]
    assert predictor["vocab_size"] == vocoder["codebook_size"]
    # Transformers forbids the talker its last 1,024 tokens; what is left are the codes.
    assert talker["text_config"]["vocab_size"] - 1024 == vocoder["codebook_size"]
    special = [value for key, value in talker.items() if key.startswith("codec_")] + list(talker["speaker_id"].values())
    assert len(set(special)) == len(special)
    assert all(vocoder["codebook_size"] <= token < talker["text_config"]["vocab_size"] for token in special)
    assert set(talker["speaker_id"]) == {"ethan", "chelsie", "aiden"}
    assert np.prod(vocoder["upsample_rates"] + vocoder["upsampling_ratios"]) == 1920
