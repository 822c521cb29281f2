"""Reading tensors' bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import TWO_SHARDS, file_of, write_checkpoint

from omnifp4.checkpoint.dtypes import DTYPE_BITS
from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError

FIRST, SECOND = TWO_SHARDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", TWO_SHARDS)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_every_tensor_as_the_safetensors_library_reads_it(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    checkpoint = open_checkpoint(folder)
    with CheckpointReader(checkpoint) as reader, ThreadPoolExecutor(4) as pool:
        arrays = dict(zip(checkpoint.tensors, pool.map(reader.read, checkpoint.tensors.values()), strict=True))
    for shard in TWO_SHARDS:
        for name, info in safetensors.deserialize((folder / shard).read_bytes()):
            assert arrays[name].tobytes() == bytes(info["data"])
            assert arrays[name].shape == tuple(info["shape"])
    assert arrays["a.bias"].dtype == np.float32
    assert arrays["a.weight"].dtype == np.uint16
    assert arrays["none"].shape == (0, 3)
    assert arrays["scalar"].shape == ()


def test_part_of_a_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    entry = checkpoint.tensors["a.weight"]
    with CheckpointReader(checkpoint) as reader:
        whole = reader.read(entry).tobytes()
        buffer = np.empty(10, dtype=np.uint8)
        reader.read_into(entry, buffer, 5)
        assert buffer.tobytes() == whole[5:15]
        with pytest.raises(ValueError, match="bytes asked of"):
            reader.read_into(entry, buffer, entry.nbytes - 9)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_type_is_read_or_refused(tmp_path: Path, dtype: str) -> None:
    size = 8 * DTYPE_BITS[dtype] // 8
    write_checkpoint(tmp_path, {"model.safetensors": {}}, index=False)
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}
    (tmp_path / "model.safetensors").write_bytes(file_of({"x": entry}, bytes(range(size))))
    checkpoint = open_checkpoint(tmp_path)
    with CheckpointReader(checkpoint) as reader:
        if DTYPE_BITS[dtype] < 8:
            with pytest.raises(CheckpointError, match=f"'x' cannot be read: {dtype} elements"):
                reader.read(checkpoint.tensors["x"])
            raw = np.empty(size, dtype=np.uint8)
            reader.read_into(checkpoint.tensors["x"], raw)
            assert raw.tobytes() == bytes(range(size))
        else:
            assert reader.read(checkpoint.tensors["x"]).tobytes() == bytes(range(size))


def test_a_file_that_shrinks_meanwhile(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with CheckpointReader(checkpoint) as reader:
        (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=f"{FIRST}: tensor 'a.bias' cannot be read: the file ends inside it"):
            reader.read(checkpoint.tensors["a.bias"])


def test_headers_alone_cannot_be_read(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="only its headers are here"):
        CheckpointReader(replace(open_checkpoint(folder), folder=None))


def test_no_file_stays_open(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = open_files()
    with CheckpointReader(checkpoint):
        assert open_files() == before + 2
    assert open_files() == before
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND}: missing"):
        CheckpointReader(checkpoint)
    assert open_files() == before
