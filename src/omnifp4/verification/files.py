"""Whether the folder is whole: shards and index, checksums, and the files that go with the weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from omnifp4.checkpoint.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    LEGACY_QUANT_CONFIG_NAME,
    Checkpoint,
    is_plain_name,
    read_json,
    safe_path,
)
from omnifp4.checkpoint.header import TensorEntry
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import CheckpointError
from omnifp4.verification.findings import Findings
from omnifp4.verification.reading import PANEL_BYTES, Buffers, Meter, batches, in_threads
from omnifp4.verification.subject import RECEIPT_NAME, SPEECH_PREFIXES, Subject

NOT_SIDE_FILES: Final = frozenset({CONFIG_NAME, INDEX_NAME, LEGACY_QUANT_CONFIG_NAME, RECEIPT_NAME})
SIDE_SUFFIXES: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")

DISPENSABLE: Final = frozenset({"generation_config.json"})
"""A loader does without them; it generates with other settings then."""

FREE_KEYS: Final = frozenset(
    {"quantization_config", "compression_config", "transformers_version", "_name_or_path", "torch_dtype", "dtype"}
)
"""Keys of a config that tools write anew when they save; the types of the tensors themselves are checked apart."""


def check_shards(subject: Subject) -> Findings:
    """``shards.index``: the index counts the bytes rightly, and no shard lies beside it."""
    found = Findings("shards.index", "shards are whole and the index is right", fix="omnifp4 repair IN OUT")
    checkpoint = subject.checkpoint
    data = sum(entry.nbytes for entry in checkpoint.tensors.values())
    if checkpoint.index_total_size not in (None, data):
        found.add(f"{INDEX_NAME}: total_size is {checkpoint.index_total_size:,}, the tensors have {data:,} bytes")
    for path in sorted(subject.folder.glob("*.safetensors")):
        if path.name in checkpoint.shard_bytes:
            continue
        if path.name.startswith(("model", "pytorch_model")):
            found.add(f"{path.name}: a shard that no index names; some loaders read it all the same")
        else:
            found.notes.append(f"{path.name} lies beside the shards and was not looked at")
    stated = (subject.receipt or {}).get("shards")
    for name, size in stated.items() if isinstance(stated, dict) else ():
        if checkpoint.shard_bytes.get(name) != size:
            found.add(
                f"{name}: {RECEIPT_NAME} says {size!r} bytes, here are {checkpoint.shard_bytes.get(name, 'none')}"
            )
    for path in sorted(subject.folder.glob("*.partial")):
        found.add(f"{path.name}: left by a run that did not end")
    shards = len(checkpoint.shard_bytes)
    found.passed = f"{shards:,} shard{'s' if shards > 1 else ''}, {len(checkpoint.tensors):,} tensors, {data:,} bytes"
    return found


def check_checksums(subject: Subject, reader: CheckpointReader, threads: int, meter: Meter) -> Findings:
    """``shards.checksums``: the bytes of every tensor are those that omnifp4.json recorded."""
    found = Findings("shards.checksums", "tensors have the bytes that were written", fix="copy or quantize it again")
    sums = stored_checksums(subject)
    if sums is None:
        found.unchecked = f"no {RECEIPT_NAME} with checksums: another tool made this artifact"
        return found
    tensors = subject.checkpoint.tensors
    for name in tensors:
        if name not in sums:
            found.add(f"{name}: {RECEIPT_NAME} has no checksum of it")
    for name in sums:
        if name not in tensors:
            found.add(f"{name}: {RECEIPT_NAME} has a checksum of it, but it is not there")
    buffers = Buffers()

    def look(batch: list[TensorEntry]) -> list[str]:
        wrong = []
        for entry in batch:
            if _crc32(entry, reader, buffers) != sums[entry.name]:
                wrong.append(entry.name)
            meter.add(entry.nbytes, "checksums")
        return wrong

    ordered = sorted((tensors[name] for name in sums if name in tensors), key=lambda entry: (entry.shard, entry.begin))
    for wrong in in_threads(look, batches(ordered, lambda entry: entry.nbytes), threads):
        for name in wrong:
            found.add(f"{name}: its bytes are not those that were written")
    found.passed = f"{len(sums):,} tensors have the bytes that {RECEIPT_NAME} recorded"
    found.failed = f"{found.count:,} tensors are not as they were written"
    return found


def stored_checksums(subject: Subject) -> Mapping[str, Any] | None:
    """CRC-32 of tensors by name, None where the receipt has none."""
    sums = (subject.receipt or {}).get("tensors")
    return sums if isinstance(sums, dict) and sums else None


def _crc32(entry: TensorEntry, reader: CheckpointReader, buffers: Buffers) -> int:
    total = 0
    for start in range(0, entry.nbytes, PANEL_BYTES):
        panel = buffers.take("panel", min(PANEL_BYTES, entry.nbytes - start))
        reader.read_into(entry, panel, start)
        total = zlib.crc32(panel.data, total)
    return total


def check_speech(subject: Subject) -> Findings | None:
    """``config.speech``: the config and the weights agree on whether the model speaks; None for models that cannot."""
    if subject.layout.model_type not in ("qwen3_omni_moe", "qwen2_5_omni"):
        return None
    found = Findings(
        "config.speech",
        "config and weights agree on speech",
        fix="omnifp4 repair IN OUT sets enable_audio_output to what the weights are",
    )
    says = subject.checkpoint.config.get("enable_audio_output", True)
    has = any(name.startswith(SPEECH_PREFIXES) for name in subject.checkpoint.tensors)
    if says is True and not has:
        found.add(
            "enable_audio_output is true, but there are no talker weights: a loader would make a random talker "
            "(saved after disable_talker())"
        )
    elif says is not True and has:
        found.add(f"enable_audio_output is {says!r}, but there are talker weights: a loader would drop them")
    found.passed = "the talker and its vocoder are there" if has else "no speech, as the config says"
    found.failed = found.shown[0] if found.shown else ""
    return found


def check_side_files(subject: Subject, source: Checkpoint | None) -> Findings:
    """``files.side``: tokenizer, processor and generation files of the source are all there."""
    found = Findings(
        "files.side", "tokenizer, processor and generation files are there", fix="copy them from the source"
    )
    if source is None or source.folder is None:
        found.unchecked = "needs --against to know which files belong to the model"
        return found
    names = sorted(_side_files(source.folder))
    changed = []
    for name in names:
        path = subject.folder / name
        if not path.is_file() and name in DISPENSABLE:
            found.notes.append(f"{name} of the source is not here: engines fall back to their defaults")
        elif not path.is_file() and subject.receipt is not None:
            found.add(f"{name}: in the source, not here")
        elif not path.is_file():
            # Other tools save a tokenizer or processor anew, under other names (vocab.json becomes tokenizer.json).
            found.notes.append(f"{name} of the source is not here")
        elif not _same_bytes(path, source.folder / name):
            changed.append(name)
            if problem := _unreadable(path):
                found.add(problem)
    found.passed = f"{len(names):,} files, {len(names) - len(changed):,} of them as in the source"
    found.failed = f"{found.count:,} of {len(names):,} files are missing or broken"
    if changed:
        found.notes.append(f"changed: {', '.join(changed)}")
    return found


def _side_files(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.suffix in SIDE_SUFFIXES and path.name not in NOT_SIDE_FILES and is_plain_name(path.name):
            if path.name.endswith(".index.json"):
                continue
            try:
                yield safe_path(folder, path.name).name
            except CheckpointError:
                continue


def _same_bytes(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _unreadable(path: Path) -> str:
    if path.suffix == ".json":
        try:
            read_json(path)
        except CheckpointError as error:
            return str(error)
    return f"{path.name}: empty" if path.stat().st_size == 0 else ""


def check_config(subject: Subject, source: Checkpoint | None) -> Findings:
    """``config.source``: apart from the quantization, the config says what the source's does."""
    found = Findings("config.source", "the config is the source's", fix="omnifp4 repair IN OUT --source WIDE")
    if source is None:
        found.unchecked = "needs --against"
        return found
    ours, theirs = dict(subject.checkpoint.config), dict(source.config)
    thinker = theirs.get("thinker_config")
    if ours.get("model_type") != theirs.get("model_type") and isinstance(thinker, dict):
        theirs = thinker
        found.notes.append("compared with the source's thinker_config, for only the thinker was saved")
    lost = 0
    for key, mine, other in _differences(ours, theirs, ""):
        if other is _ABSENT or mine is _ABSENT:
            lost += 1
        else:
            found.add(f"{key} is {_short(mine)}, in the source {_short(other)}")
    found.passed = "every key in both has the same value"
    if lost:
        found.notes.append(f"{lost:,} keys are in one of them only, as when a tool saves it anew")
    return found


_ABSENT: Final = object()


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*ours, *theirs]):
        if key in FREE_KEYS:
            continue
        mine, other = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _differences(mine, other, f"{path}{key}.")
        elif mine is _ABSENT or other is _ABSENT or mine != other:
            yield f"{path}{key}", mine, other


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
