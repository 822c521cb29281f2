"""Checkpoint folders: index against shards, names that lead elsewhere, links, and files that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import TWO_SHARDS, write_checkpoint, write_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnifp4.checkpoint.folder import INDEX_NAME, is_plain_name, open_checkpoint, parse_index, safe_path
from omnifp4.errors import CheckpointError

FIRST, SECOND = TWO_SHARDS
WEIGHT_MAP = {name: shard for shard, tensors in TWO_SHARDS.items() for name in tensors}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TWO_SHARDS)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_right_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert {name: entry.shard for name, entry in checkpoint.tensors.items()} == WEIGHT_MAP
    assert checkpoint.shard_bytes == {shard: (folder / shard).stat().st_size for shard in TWO_SHARDS}
    assert checkpoint.weight_bytes == sum(checkpoint.shard_bytes.values())
    assert (checkpoint.folder, checkpoint.location, checkpoint.index_total_size) == (folder, str(folder), 123)
    assert checkpoint.metadata[FIRST] == {"format": "pt"}


def test_a_single_shard_needs_no_index(tmp_path: Path) -> None:
    shards = {"model.safetensors": TWO_SHARDS[FIRST]}
    without = open_checkpoint(write_checkpoint(tmp_path / "without", shards, index=False))
    with_index = open_checkpoint(write_checkpoint(tmp_path / "with", shards, index=True))
    assert without.tensors == with_index.tensors
    assert without.index_total_size is None


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    assert f"{SECOND}: missing" in refusal(folder)
    (folder / INDEX_NAME).unlink()
    assert f"{INDEX_NAME}: missing, though there are shards ({FIRST}" in refusal(folder)
    (folder / FIRST).unlink()
    assert "no weights" in refusal(folder)
    (folder / "pytorch_model.bin").touch()
    assert "weights are in pytorch_model.bin; safetensors are needed" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)
    assert "no such folder" in refusal(folder / "nowhere")
    assert "no such folder" in refusal(folder / "pytorch_model.bin")


def test_index_and_shards_disagree(folder: Path) -> None:
    write_index(folder, {**WEIGHT_MAP, "more": FIRST})
    assert f"{INDEX_NAME}: tensor 'more' is not in {FIRST}, where the index says it is" in refusal(folder)
    write_index(folder, {**WEIGHT_MAP, "a.weight": SECOND})
    assert f"tensor 'a.weight' is in {FIRST}, not in {SECOND}" in refusal(folder)
    write_index(folder, {name: shard for name, shard in WEIGHT_MAP.items() if name != "a.weight"})
    assert f"tensor 'a.weight' of {FIRST} is not in the index" in refusal(folder)
    write_index(folder, WEIGHT_MAP)
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())
    assert f"{SECOND}: tensor 'a.weight' is also in {FIRST}" in refusal(folder)


def test_a_single_file_beside_an_index_of_others(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / FIRST).read_bytes())
    assert "holds both model.safetensors and an index of other shards" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "..", ".", "", "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", "C:x.safetensors",
        "x.safetensors/", "./x.safetensors", "a\0b.safetensors", "a\nb.safetensors", "\ud800.safetensors", "‮.safetensors",
        None, 1, ["x.safetensors"],
    ],
)  # fmt: skip
def test_an_index_that_leads_elsewhere(folder: Path, name: Any) -> None:
    write_index(folder, {**WEIGHT_MAP, "a.weight": name})
    assert "'a.weight' is said to be in" in refusal(folder)
    assert "no plain file name" in refusal(folder)


def test_an_index_of_other_files(folder: Path) -> None:
    write_index(folder, {**WEIGHT_MAP, "a.weight": "config.json"})
    assert "no safetensors file" in refusal(folder)
    write_index(folder, {**WEIGHT_MAP, "a.weight": "x" * 300 + ".safetensors"})
    assert "cannot be read: File name too long" in refusal(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, None, 1])
def test_an_index_without_a_map(folder: Path, index: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert "no weight_map" in refusal(folder)


@pytest.mark.parametrize(
    ("stated", "read"),
    [("1e999", None), ("1" + "0" * 400, 10**400), ("12.0", 12), ("true", None), ('"9"', None), ("7", 7)],
)
def test_total_size(folder: Path, stated: str, read: int | None) -> None:
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": WEIGHT_MAP})
    (folder / INDEX_NAME).write_text(text.replace('"total_size": 0', f'"total_size": {stated}'))
    assert open_checkpoint(folder).index_total_size == read


@pytest.mark.parametrize("file", ["config.json", INDEX_NAME])
@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "not valid JSON"), (b"{", "not valid JSON"), (b'{"a":1,"a":2}', "occurs twice"), (b"\xff", "not UTF-8"),
     (b'{"a": NaN}', "NaN"), (b'{"a":' * 100_000, "nested too deeply"), (b"[]", "no JSON object|no weight_map")],
)  # fmt: skip
def test_unreadable_json_is_named(folder: Path, file: str, content: bytes, told: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}: .*({told})"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", INDEX_NAME, FIRST])
def test_what_is_no_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    assert f"{file}: no file" in refusal(folder)
    (folder / file).rmdir()
    os.mkfifo(folder / file)
    assert f"{file}: no file" in refusal(folder)


def test_links_that_lead_out(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (folder / SECOND).rename(outside)
    (folder / SECOND).symlink_to(outside)
    assert f"{SECOND}: a link that leads out of the checkpoint, to {outside}" in refusal(folder)
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)
    assert f"{SECOND}: missing" in refusal(folder)
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("nowhere")
    assert f"{SECOND}: missing" in refusal(folder)
    (folder / SECOND).unlink()
    outside.rename(folder / "second.safetensors")
    (folder / SECOND).symlink_to("second.safetensors")
    assert len(open_checkpoint(folder).tensors) == 5


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_right(tmp_path: Path, shared: bool) -> None:
    """``snapshots/COMMIT/file`` is a link to ``blobs/HASH``, which may be a link to a blob that repositories share."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = write_checkpoint(repository / "snapshots" / "0123", TWO_SHARDS)
    (repository / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "ab").mkdir(parents=True)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob, store = repository / "blobs" / f"{number}", tmp_path / "hub" / "blobs" / "ab" / f"{number}"
        path.rename(store if shared else blob)
        if shared:
            blob.symlink_to(Path("../../blobs/ab") / store.name)
        path.symlink_to(Path("../../blobs") / blob.name)
    assert len(open_checkpoint(snapshot).tensors) == 5
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert len(open_checkpoint(link).tensors) == 5
    (tmp_path / "secret.safetensors").touch()
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to(tmp_path / "secret.safetensors")
    assert "leads out of the checkpoint" in refusal(snapshot)


def test_safe_path_takes_plain_names_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no plain file name"):
        safe_path(tmp_path, "../x")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=12) | st.sampled_from(["..", "a/../b", "//", "a:b"]))
def test_plain_names_stay_in_their_folder(name: str) -> None:
    if is_plain_name(name):
        assert Path(os.path.normpath(Path("/home/x") / name)).parent == Path("/home/x")


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just([])


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_changed_index_is_the_same_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_checkpoint(folder, TWO_SHARDS)
    write_index(folder, WEIGHT_MAP)
    text = bytearray((folder / INDEX_NAME).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        begin = data.draw(st.integers(0, len(text) - 1))
        text[begin : begin + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (folder / INDEX_NAME).write_bytes(text)
    try:
        found = open_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert {name: entry.shard for name, entry in found.tensors.items()} == WEIGHT_MAP


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=8), VALUES | st.dictionaries(st.text(max_size=8), VALUES)) | VALUES)
def test_any_index_is_read_or_refused(index: Any) -> None:
    for value in (index, {"weight_map": index}, {"weight_map": {"x": "y.safetensors"}, "metadata": index}):
        try:
            weight_map, total = parse_index(value, "index")
        except CheckpointError:
            continue
        assert all(is_plain_name(shard) for shard in weight_map.values())
        assert total is None or type(total) is int
