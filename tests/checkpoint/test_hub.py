"""Checkpoints on the Hub, against a stand-in for it: headers alone, whole downloads, the cache, and every failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import TWO_SHARDS, header_object, write_checkpoint, write_index
from hub_stand_in import COMMIT, Fault, HubStandIn, turn_to

from omnifp4.checkpoint import hub as hub_module
from omnifp4.checkpoint import hub_requests
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.hub import fetch_headers, fetch_model, is_hub_id
from omnifp4.errors import CheckpointError, OutputError

MODEL = "someone/omni"
BIG_SHARDS = {
    f"model-0000{number}-of-00003.safetensors": {
        f"layers.{number}.{index}.weight": ("BF16", (4096, 2048)) for index in range(10)
    }
    for number in range(1, 4)
}
"""Half a GB that takes no room on the disk."""


@pytest.fixture
def folder(hub: HubStandIn) -> Path:
    """The stand-in's copy of a small checkpoint."""
    return write_checkpoint(hub.root / MODEL, TWO_SHARDS)


def refusal(model: str = MODEL, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch_headers(model, revision)
    assert "\n" not in str(caught.value)
    assert model in str(caught.value)
    return str(caught.value)


def test_a_local_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(MODEL)
    (tmp_path / MODEL).mkdir(parents=True)
    assert not is_hub_id(MODEL)
    assert not is_hub_id(str(tmp_path))


@pytest.mark.parametrize(
    "model",
    ["/no/such/folder", "./omni", "../omni", "a/b/c", "omni", "", "a\\b", "a/b@main", "a/..", "a//b", "x" * 5000],
)
def test_neither_a_folder_nor_a_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a local folder nor a Hub id"):
        is_hub_id(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="no folder"):
        is_hub_id(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("redirects", [True, False])
def test_headers_come_without_weights(hub: HubStandIn, redirects: bool) -> None:
    hub.redirects = redirects
    folder = write_checkpoint(hub.root / MODEL, BIG_SHARDS, sparse=True)
    local, remote = open_checkpoint(folder), fetch_headers(MODEL)
    assert remote.location == f"hub:{MODEL}@{COMMIT}"
    assert remote.folder is None
    for fact in ("config", "tensors", "shard_bytes", "metadata", "index_total_size"):
        assert getattr(remote, fact) == getattr(local, fact), fact
    assert hub.bytes_sent < 0.01 * local.weight_bytes
    assert all(size <= hub_requests.FIRST_BYTES for name, size in hub.sent.items() if name in BIG_SHARDS)
    assert sum(1 for method, path, _ in hub.requests if path.startswith(f"/{MODEL}/resolve")) == 2 + len(BIG_SHARDS)


def test_a_server_that_ignores_ranges_sends_little_more(hub: HubStandIn) -> None:
    folder = write_checkpoint(hub.root / MODEL, BIG_SHARDS, sparse=True)
    hub.fault = Fault.IGNORES_RANGE
    local, remote = open_checkpoint(folder), fetch_headers(MODEL)
    assert remote.tensors == local.tensors
    # What the kernel had buffered when the connection was closed.
    assert hub.bytes_sent < 0.1 * local.weight_bytes


def test_a_long_header_takes_a_second_request(hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests, "FIRST_BYTES", 20)
    assert fetch_headers(MODEL).tensors == open_checkpoint(folder).tensors
    ranges = [asked for _, path, asked in hub.requests if path.startswith("/cdn/")]
    assert sorted(set(ranges))[0] == "bytes=0-19"
    assert len(ranges) == 4


@pytest.mark.parametrize("index", [True, False])
def test_a_single_shard(hub: HubStandIn, index: bool) -> None:
    shards = {"model.safetensors": TWO_SHARDS["model-00001-of-00002.safetensors"]}
    folder = write_checkpoint(hub.root / MODEL, shards, index=index)
    assert fetch_headers(MODEL).tensors == open_checkpoint(folder).tensors


def test_revisions(hub: HubStandIn, folder: Path) -> None:
    assert fetch_headers(MODEL, "v1").location == f"hub:{MODEL}@{COMMIT}"
    assert fetch_headers(MODEL, COMMIT).location == f"hub:{MODEL}@{COMMIT}"
    assert "no such revision" in refusal(MODEL, "v2")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault.UNAUTHORIZED, "not found at http://127.0.0.1:.* or private .HTTP 401.; nor is there a local .*HF_TOKEN"),
        (Fault.GATED, "gated, and access is not granted.*HF_TOKEN"),
        (Fault.RATE_LIMITED, "limits the rate of requests .HTTP 429.*try again in 300 s"),
        (Fault.UNAVAILABLE, "answers HTTP 503.*try again later"),
        (Fault.WRONG_RANGE, "another range than asked for"),
        (Fault.UNNAMED_RANGE, "does not tell which range"),
        (Fault.NO_SIZE, "does not tell its size"),
        (Fault.TRUNCATES, "truncated|cannot be reached"),
        (Fault.COMPRESSES, "compresses it unasked"),
        (Fault.NOT_JSON, "answer is not understood.*HF_ENDPOINT"),
        (Fault.NO_COMMIT, "names no commit"),
    ],
)
def test_a_fault_of_the_server_is_one_line(hub: HubStandIn, folder: Path, fault: Fault, told: str) -> None:
    hub.fault = fault
    with pytest.raises(CheckpointError, match=told):
        fetch_headers(MODEL)
    refusal()


def test_a_passing_failure_is_tried_again(hub: HubStandIn, folder: Path) -> None:
    hub.fault = Fault.TWICE_UNAVAILABLE
    assert fetch_headers(MODEL).tensors == open_checkpoint(folder).tensors
    assert hub.failures == 2


def test_no_such_repository(hub: HubStandIn) -> None:
    assert "not found" in refusal("someone/else")


def test_no_network(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    turn_to("http://127.0.0.1:9", monkeypatch)
    message = refusal()
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert "HF_HUB_OFFLINE" in message


def test_the_token_is_sent_but_not_to_be_seen(hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    assert "HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf_wrong" not in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(fetch_headers(MODEL).tensors) == 5
    assert any(path.startswith("/cdn/") for _, path, _ in hub.requests)
    assert not hub.leaked_tokens


def test_no_weights(hub: HubStandIn, folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert "no weights" in refusal()
    (folder / "pytorch_model.bin").touch()
    assert "safetensors are needed" in refusal()
    (folder / "model-00001-of-00002.safetensors").touch()
    assert "index.json: missing" in refusal()
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal()


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors"]
)
def test_an_index_that_leads_elsewhere(hub: HubStandIn, folder: Path, name: str) -> None:
    write_index(folder, {"a.weight": name})
    assert "no plain file name" in refusal()
    assert not hub.sent.keys() & TWO_SHARDS.keys()


def test_shards_are_checked_as_in_a_folder(hub: HubStandIn, folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "truncated" in refusal()
    shard.write_bytes(b"")
    assert f"{shard.name}: truncated" in refusal()
    shard.write_bytes(b"\xff" * 100)
    assert "absurd" in refusal()
    shard.unlink()
    assert f"{shard.name}: missing" in refusal()
    shard.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    assert "is also in" in refusal()
    shard.write_bytes(whole)
    write_index(folder, {"a.weight": "model-00001-of-00002.safetensors"})
    assert "not in the index" in refusal()


def test_a_config_that_is_no_object(hub: HubStandIn, folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    assert "no JSON object" in refusal()
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    assert "occurs twice" in refusal()


def test_a_download_has_what_is_needed_and_then_serves_offline(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for extra in ("tokenizer.json", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "README.md"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("{}")
    snapshot = fetch_model(MODEL, progress=False)
    names = {path.name for path in snapshot.iterdir()}
    assert names == {"config.json", "model.safetensors.index.json", "tokenizer.json", "README.md", *TWO_SHARDS}
    # In the cache each file is a link to a blob.
    assert open_checkpoint(snapshot).tensors == open_checkpoint(folder).tensors

    hub.forget()
    cached = fetch_headers(MODEL)
    assert (cached.location, cached.folder) == (f"hub:{MODEL}@{COMMIT}", snapshot)
    assert not any("/resolve/" in path or "/cdn/" in path for _, path, _ in hub.requests)
    assert fetch_model(MODEL, progress=False) == snapshot

    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_headers(MODEL).tensors == cached.tensors
    assert fetch_model(MODEL) == snapshot
    assert not hub.requests

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    turn_to("http://127.0.0.1:9", monkeypatch)
    assert fetch_headers(MODEL).folder == snapshot
    assert fetch_headers(MODEL, COMMIT).folder == snapshot

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert "HF_HUB_OFFLINE forbids" in refusal()
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert "not in the local cache" in refusal()


def test_a_damaged_shard_is_refused_before_the_download(hub: HubStandIn, folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="absurd"):
        fetch_model(MODEL, progress=False)
    assert sum(hub.sent.get(shard, 0) for shard in TWO_SHARDS) < 1000


def test_too_little_disk_is_said_before_the_download(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "free_bytes", lambda path: 10)
    with pytest.raises(OutputError, match=r"0\.0 GB are free where the download of .* needs .*HF_HOME"):
        fetch_model(MODEL, progress=False)
    assert not any(method == "HEAD" for method, _, _ in hub.requests)


def test_the_environment_decides(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    """In a process of its own: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE; and torch is not imported."""
    hub.token = "hf_secret"
    code = (
        "import json, sys\n"
        "import omnifp4.checkpoint.hub as hub\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        f"found = hub.fetch_headers({MODEL!r}); folder = hub.fetch_model({MODEL!r})\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps([len(found.tensors), str(folder)]))"
    )
    home = tmp_path / "home"
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = {**inherited, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_secret"}

    def run(**more: str) -> tuple[int, Path]:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **more}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        count, where = json.loads(done.stdout)
        return count, Path(where)

    count, where = run()
    assert count == 5
    assert where.is_relative_to(home)
    hub.forget()
    assert run(HF_HUB_OFFLINE="1") == (count, where)
    assert not hub.requests


def test_header_object_is_what_the_stand_in_serves(hub: HubStandIn, folder: Path) -> None:
    entries = fetch_headers(MODEL).tensors
    for shard, tensors in TWO_SHARDS.items():
        for name, stated in header_object(tensors).items():
            entry = entries[name]
            assert (entry.shard, entry.dtype, list(entry.shape)) == (shard, stated["dtype"], stated["shape"])
