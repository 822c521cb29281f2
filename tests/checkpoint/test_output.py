"""Written shards: readable by the safetensors library, aligned, the same at every plan, and resumable when disks fill."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifp4.checkpoint.dialects.base import StoredTensor
from omnifp4.checkpoint.dtypes import DTYPE_BITS, byte_count
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.output import OutputWriter, PlannedOutput, plan_output, write_json, write_text
from omnifp4.checkpoint.reader import CheckpointReader

GROUPS = [
    [
        StoredTensor(f"layers.{layer}.weight", "U8", (24, 8)),
        StoredTensor(f"layers.{layer}.weight_scale", "F8_E4M3", (24, 1)),
        StoredTensor(f"layers.{layer}.weight_scale_2", "F32", ()),
        StoredTensor(f"layers.{layer}.norm", "BF16", (5,)),
    ]
    for layer in range(6)
]


def content_of(tensor: StoredTensor) -> bytes:
    size = byte_count(tensor.dtype, tensor.shape)
    return np.random.default_rng(zlib.crc32(tensor.name.encode())).bytes(size)


def write_whole(folder: Path, planned: PlannedOutput) -> dict[str, bytes]:
    """Write every tensor, from several threads, and whatever a checkpoint has besides."""
    tensors = [tensor for group in GROUPS for tensor in group]
    contents = {tensor.name: content_of(tensor) for tensor in tensors}
    folder.mkdir(exist_ok=True)
    with OutputWriter(folder, planned) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: writer.write(item[0], np.frombuffer(item[1], np.uint8)), reversed(contents.items())))
        assert all(writer.checksum(name) == zlib.crc32(content) for name, content in contents.items())
        writer.sync()
    write_json(folder / "config.json", {"model_type": "llama"})
    if (index := planned.index()) is not None:
        write_json(folder / "model.safetensors.index.json", index)
    return contents


@pytest.mark.parametrize("max_shard_bytes", [1, 500, 10**9])
def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, max_shard_bytes: int) -> None:
    safetensors = pytest.importorskip("safetensors")
    planned = plan_output(GROUPS, max_shard_bytes)
    contents = write_whole(tmp_path, planned)
    found = {}
    for shard in planned.shards:
        path = tmp_path / shard.file_name
        assert path.stat().st_size == shard.total_bytes
        for name, info in safetensors.deserialize(path.read_bytes()):
            found[name] = bytes(info["data"])
            begin, _ = shard.offsets[name]
            assert begin % max(1, DTYPE_BITS[info["dtype"]] // 8) == 0
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(shard.offsets)
            norm = next(name for name in file.keys() if name.endswith("scale_2"))  # noqa: SIM118
            assert file.get_tensor(norm).tobytes() == contents[norm]
    assert found == contents
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weight_bytes == planned.weight_bytes
    assert sum(entry.nbytes for entry in checkpoint.tensors.values()) == planned.tensor_bytes
    with CheckpointReader(checkpoint) as reader:
        assert {name: reader.read(entry).tobytes() for name, entry in checkpoint.tensors.items()} == contents


def test_shards() -> None:
    planned = plan_output(GROUPS, 500)
    assert [shard.file_name for shard in planned.shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = planned.index()
    assert index is not None
    assert index["metadata"]["total_size"] == planned.tensor_bytes
    for group in GROUPS:
        assert len({index["weight_map"][tensor.name] for tensor in group}) == 1
    single = plan_output(GROUPS)
    assert [shard.file_name for shard in single.shards] == ["model.safetensors"]
    assert single.index() is None


TENSORS = st.builds(
    lambda dtype, shape: (dtype, tuple(shape)),
    st.sampled_from(sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)),
    st.lists(st.integers(0, 4), max_size=3),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(TENSORS, min_size=1, max_size=4), max_size=6), st.integers(1, 300))
def test_every_plan_is_whole_aligned_and_the_same_again(
    groups: list[list[tuple[str, tuple[int, ...]]]], max_shard_bytes: int
) -> None:
    stored = [
        [StoredTensor(f"{number}.{index}", dtype, shape) for index, (dtype, shape) in enumerate(group)]
        for number, group in enumerate(groups)
    ]
    planned = plan_output(stored, max_shard_bytes)
    assert planned == plan_output(stored, max_shard_bytes)
    types = {tensor.name: tensor.dtype for group in stored for tensor in group}
    assert sorted(name for shard in planned.shards for name in shard.offsets) == sorted(types)
    for shard in planned.shards:
        position = len(shard.header)
        for name, (begin, end) in shard.offsets.items():
            assert begin == position
            assert begin % (DTYPE_BITS[types[name]] // 8) == 0
            position = end
        assert position == shard.total_bytes


def test_bytes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with OutputWriter(tmp_path, plan_output(GROUPS)) as writer:
        with pytest.raises(ValueError, match="do not fit"):
            writer.write("layers.0.norm", np.zeros(11, np.uint8))
        assert writer.write("layers.0.norm", np.zeros(0, np.uint8)) == 0


def test_a_writer_opened_again_keeps_what_is_there(tmp_path: Path) -> None:
    planned = plan_output(GROUPS, 500)
    contents = write_whole(tmp_path, planned)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (tmp_path / planned.shards[0].file_name).open("r+b") as file:
        file.write(b"torn")  # A header that was being written.
    with OutputWriter(tmp_path, planned) as writer:
        assert all(writer.checksum(name) == zlib.crc32(content) for name, content in contents.items())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_system_that_stops_short_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: pwrite(file, data[:7], position))
    planned = plan_output(GROUPS, 500)
    contents = write_whole(tmp_path, planned)
    with CheckpointReader(open_checkpoint(tmp_path)) as reader:
        entries = reader.checkpoint.tensors
        assert {name: reader.read(entry).tobytes() for name, entry in entries.items()} == contents


def test_a_full_disk_is_an_os_error_and_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    planned = plan_output(GROUPS, 500)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            OutputWriter(tmp_path, planned)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    contents = write_whole(tmp_path, planned)
    assert len(open_checkpoint(tmp_path).tensors) == len(contents)


def test_a_file_size_limit_ends_in_an_os_error(tmp_path: Path) -> None:
    """A real limit of the system, in a process of its own; what was written before it stays, and can be gone on with."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from omnifp4.checkpoint.dialects.base import StoredTensor\n"
        "from omnifp4.checkpoint.output import OutputWriter, plan_output\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "planned = plan_output([[StoredTensor('x', 'U8', (10000,))]])\n"
        "try:\n    OutputWriter(Path(sys.argv[1]), planned)\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == os.strerror(errno.EFBIG), done.stderr


def test_small_files_are_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "config.json", {"name": "Zoë", "b": [1]})
    assert (tmp_path / "config.json").read_text() == '{\n  "name": "Zoë",\n  "b": [\n    1\n  ]\n}\n'

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "config.json", "half")
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "Zoë"
