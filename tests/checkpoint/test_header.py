"""Headers: right ones are read as the safetensors library reads them; anything else is a CheckpointError."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import file_of, header_object, safetensors_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnifp4.checkpoint.dtypes import DTYPE_BITS
from omnifp4.checkpoint.folder import read_shard_header
from omnifp4.checkpoint.header import TensorEntry, build_header, header_length, parse_header, strict_json
from omnifp4.errors import CheckpointError

TENSORS = {
    "layer.weight": ("BF16", (4, 16)),
    "layer.scale": ("F32", ()),
    "layer.codes": ("U8", (3, 8)),
    "empty": ("BF16", (0, 3)),
}
RIGHT = safetensors_bytes(TENSORS, {"format": "pt"})
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def parse(content: bytes) -> tuple[list[TensorEntry], dict[str, str]]:
    length = header_length(content[:8], len(content), "file")
    return parse_header(content[8 : 8 + length], "file", len(content), "file")


def with_entry(**changes: Any) -> bytes:
    """A file of one F32 tensor of shape [2, 2], something of whose entry is changed."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return file_of({"x": {key: value for key, value in entry.items() if value is not None}}, bytes(16))


def library_facts(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library reads, or None if it refuses."""
    safetensors = pytest.importorskip("safetensors")
    try:
        found = safetensors.deserialize(content)
    except Exception:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def our_facts(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        entries, _ = parse(content)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return None
    return {entry.name: (entry.dtype, entry.shape, content[entry.begin : entry.end]) for entry in entries}


def test_a_right_header() -> None:
    entries, metadata = parse(RIGHT)
    assert metadata == {"format": "pt"}
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == TENSORS
    assert our_facts(RIGHT) == library_facts(RIGHT)
    assert {entry.name: (entry.nbytes, entry.parameters) for entry in entries}["layer.weight"] == (128, 64)


@pytest.mark.parametrize("end", range(len(RIGHT)))
def test_truncated_anywhere(end: int) -> None:
    with pytest.raises(CheckpointError):
        parse(RIGHT[:end])


def test_a_byte_too_many() -> None:
    with pytest.raises(CheckpointError, match="1 bytes belong to no tensor"):
        parse(RIGHT + b"\0")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 100_000_000, len(RIGHT)])
def test_an_absurd_header_length_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + RIGHT[8:])
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"absurd|truncated"):
        read_shard_header(path, path.name)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (file_of(b""), "not valid JSON"),
        (file_of(b"{"), "not valid JSON"),
        (file_of(b"\xff\xfe{}"), "not UTF-8"),
        (file_of([]), "no JSON object"),
        (file_of("x"), "no JSON object"),
        (file_of(b'{"x": NaN}'), "NaN is not valid JSON"),
        (file_of(b'{"x": -Infinity}'), "-Infinity is not valid JSON"),
        (file_of(b"[" * 100_000), "nested too deeply"),
        (file_of(b'{"a":' * 100_000), "nested too deeply"),
        (file_of(b'{"a": 1, "a": 1}'), "'a' occurs twice"),
        (file_of(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' occurs twice"),
        (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (file_of({"__metadata__": {"format": 1}}), "not a map of strings"),
        (file_of({"__metadata__": []}), "not a map of strings"),
        (file_of({"__metadata__": {"a": "\ud800"}}), "not Unicode"),
        (file_of({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "not Unicode"),
        (file_of({"x": 1}), "exactly dtype, shape and data_offsets"),
        (with_entry(extra=1), "exactly dtype, shape and data_offsets"),
        (with_entry(dtype=None), "exactly dtype, shape and data_offsets"),
        (with_entry(dtype="F128"), "unknown dtype 'F128'"),
        (with_entry(dtype=["F32"]), "unknown dtype"),
        (with_entry(dtype="F4", shape=[31]), "31 elements of F4 do not fill whole bytes"),
        (with_entry(dtype="F6_E2M3", shape=[3]), "do not fill whole bytes"),
        (with_entry(shape=4), "not a list of sizes"),
        (with_entry(shape=[True, 4]), "not a list of sizes"),
        (with_entry(shape=[-2, -2]), "not a list of sizes"),
        (with_entry(shape=[2.0, 2]), "not a list of sizes"),
        (with_entry(shape=[2**63]), "not a list of sizes"),
        (with_entry(shape=["2", "2"]), "not a list of sizes"),
        (with_entry(shape=[2**40, 2**40]), "absurd"),
        (with_entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "absurd"),
        (with_entry(shape=[1] * 33), "33 dimensions are absurd"),
        (with_entry(shape=[2, 3]), "16 bytes where F32 .2, 3. needs 24"),
        (with_entry(data_offsets=[0]), "not .begin, end."),
        (with_entry(data_offsets=[16, 0]), "not .begin, end."),
        (with_entry(data_offsets=[False, 16]), "not .begin, end."),
        (with_entry(data_offsets=[4, 20]), "truncated"),
        (with_entry(shape=[1, 2], data_offsets=[8, 16]), "leaves a gap"),
        (with_entry(shape=[1, 2], data_offsets=[0, 8]), "8 bytes belong to no tensor"),
    ],
)
def test_a_wrong_header_is_told(content: bytes, told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        parse(content)
    assert str(caught.value).startswith("file")


def test_overlapping_tensors() -> None:
    header = header_object({"a": ("F32", (2,)), "b": ("F32", (2,))})
    header["b"]["data_offsets"] = [4, 12]
    with pytest.raises(CheckpointError, match="'b' overlaps"):
        parse(file_of(header, bytes(12)))


@pytest.mark.parametrize("shape", [[2**62] * 200_000, [2**62] * 100_000 + [0]])
def test_many_dimensions_take_no_time(shape: list[int]) -> None:
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="dimensions are absurd"):
        parse(with_entry(shape=shape))
    assert time.perf_counter() - begin < 2


@FUZZ
@given(st.data())
def test_changed_bytes_never_change_the_facts_in_silence(data: st.DataObject) -> None:
    """What we take, the safetensors library takes for the same tensors; all else is a CheckpointError."""
    content = bytearray(RIGHT)
    header_end = 8 + struct.unpack("<Q", RIGHT[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, header_end - 1))
        content[begin : begin + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(
                st.binary(max_size=3), st.sampled_from([b"0", b"9", b'"', b"}", b"]", b",", b"-", b"1e9", b"null"])
            )
        )
    ours = our_facts(bytes(content))
    if ours is not None:
        assert ours == library_facts(bytes(content))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@FUZZ
@given(st.data())
def test_changed_values_never_change_the_facts_in_silence(data: st.DataObject) -> None:
    header = header_object(TENSORS, {"format": "pt"})
    entry = header[data.draw(st.sampled_from(sorted(TENSORS)))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    sizes = st.lists(st.integers(0, 200) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64]), max_size=4)
    entry[field] = data.draw(st.one_of(JSON_VALUES, sizes, st.sampled_from(sorted(DTYPE_BITS))))
    content = file_of(header, RIGHT[-156:])
    ours = our_facts(content)
    if ours is not None:
        assert ours == library_facts(content)


@FUZZ
@given(JSON_VALUES)
def test_any_json_is_an_error_or_no_tensors(value: Any) -> None:
    our_facts(file_of(json.dumps(value).encode()))


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
WHOLE_BYTES = sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)


@FUZZ
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.tuples(st.sampled_from(WHOLE_BYTES), SHAPES))
)
def test_what_is_built_is_read_again(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    tensors.pop("__metadata__", None)
    stored = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    start, offsets = build_header(stored, {"format": "pt"})
    assert len(start) % 8 == 0
    content = start + bytes(max((end for _, end in offsets.values()), default=len(start)) - len(start))
    entries, metadata = parse(content)
    assert metadata == {"format": "pt"}
    assert [(entry.name, entry.dtype, entry.shape) for entry in entries] == stored
    assert {entry.name: (entry.begin, entry.end) for entry in entries} == offsets
    assert build_header(stored, {"format": "pt"})[0] == start


def test_a_name_cannot_be_laid_out_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        build_header([("a", "U8", (1,)), ("a", "U8", (1,))], {})


@FUZZ
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_strict_json_raises_nothing_else(text: str | bytes) -> None:
    try:
        strict_json(text if isinstance(text, str) else text.decode("latin-1"), "subject")
    except CheckpointError as error:
        assert str(error).startswith("subject")
