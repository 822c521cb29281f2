"""Random checkpoints of any config, and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_reading import read_bits

from omnifp4.errors import ModelError, OutputError
from omnifp4.models import layout_for
from omnifp4.tiny import checkpoint, released_config, tiny_config, write_random_checkpoint
from omnifp4.tiny.__main__ import main, parse_bytes
from omnifp4.tiny.shards import plan_shards


def small_released_config() -> dict[str, Any]:
    """The released config with fewer layers and experts, so that a test can write it."""
    config = released_config("qwen3-omni-30b-a3b")
    for section in (config["thinker_config"]["text_config"], config["talker_config"]["text_config"]):
        section.update(num_hidden_layers=2, num_experts=2, num_experts_per_tok=2, vocab_size=1280)
    return config


def test_same_weights_as_the_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tiny_config(), tmp_path / "again")
    assert (folder / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_bytes_do_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PART_ELEMENTS", 5_000)
    written: list[int] = []
    one = write_random_checkpoint(tiny_config(), tmp_path / "one", workers=1, shard_bytes=4_000_000)
    four = write_random_checkpoint(
        tiny_config(), tmp_path / "four", workers=4, shard_bytes=4_000_000, on_bytes=written.append
    )
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in four.iterdir())
    assert all((one / name).read_bytes() == (four / name).read_bytes() for name in names)
    assert sum(written) == sum(bits.nbytes for bits in read_bits(four).values())
    assert len(written) > 1000


def test_released_config_gives_its_layout() -> None:
    config = released_config("qwen3-omni-30b-a3b")
    tensors = [tensor for tensor in layout_for(config).tensors if not tensor.optional]
    assert sum(tensor.parameters for tensor in tensors) == pytest.approx(35.26e9, rel=1e-3)
    shards = plan_shards(((tensor.name, tensor.shape) for tensor in tensors), checkpoint.REAL_SHARD_BYTES)
    assert shards[0].file_name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) == 15


def test_text_only_keeps_the_thinkers_decoder(tmp_path: Path) -> None:
    folder = write_random_checkpoint(small_released_config(), tmp_path / "text", layers=1, text_only=True, workers=2)
    names = set(read_bits(folder))
    assert {name.split(".")[1] for name in names} == {"model", "lm_head"}
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"0"}
    config = json.loads((folder / "config.json").read_text())
    assert config["enable_audio_output"] is False
    unmade = layout_for(config).missing(names)
    assert unmade
    assert all(name.startswith(("thinker.audio_tower.", "thinker.visual.")) for name in unmade)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelError, match="known: qwen3-omni-30b-a3b"):
        released_config("qwen3-omni-99b")


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OutputError, match="1,000,000 free"):
        write_random_checkpoint(tiny_config(), tmp_path / "big")
    assert list((tmp_path / "big").iterdir()) == []


def test_a_failed_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_all", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_random_checkpoint(tiny_config(), tmp_path / "broken", workers=2)
    assert list((tmp_path / "broken").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 500 * 10**6), ("1.5g", 1_500_000_000), ("1000", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_command_line_writes_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "tiny"), "--layers", "2", "--shard-bytes", "4MB"]) == 0
    assert (tmp_path / "tiny" / "model.safetensors.index.json").exists()
    assert "MB of weights" in capsys.readouterr().out


def test_command_line_writes_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    out = tmp_path / "out"
    arguments = [str(out), "--config", str(tmp_path / "config.json"), "--layers", "1", "--text-only", "--workers", "2"]
    assert main(arguments) == 0
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.json"], "cannot read the config missing.json"),
        (["--config", "bad.json"], "is not JSON"),
        (["--config", "list.json"], "is not a JSON object"),
    ],
)
def test_command_line_explains_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("list.json").write_text("[]")
    assert main(["out", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--text-only"], ["--workers", "2"], ["--layers", "0"], ["--shard-bytes", "big"]]
)
def test_command_line_refuses_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["out", *arguments])
    assert stop.value.code == 2
