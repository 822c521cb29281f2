"""Calibration sets: chosen evenly, copied with their media, hashed, and refused where anything is not right."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from omnifp4.errors import OmniFP4Error

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bundled_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Sixty of the bundled conversations."""
    from omnifp4 import dataset

    out = tmp_path_factory.mktemp("sets") / "set"
    return out, dataset(out)


def test_sixty_of_every_modality(bundled_set: tuple[Path, Any]) -> None:
    from omnifp4.calibration.conversations import open_set

    out, receipt = bundled_set
    assert receipt.conversations == 60
    assert {one.modality: one.conversations for one in receipt.modalities} == dict.fromkeys(
        ("text", "image", "audio", "mixed"), 15
    )
    assert all(receipt.tokens[kind] > 100 for kind in ("text", "image", "audio"))
    assert {kind for one in receipt.modalities for kind in one.tokens} == {"text", "image", "audio"}
    assert receipt.spoken > 0
    assert receipt.counted_by == "the bundled tiny model"
    found = open_set(out)
    assert found.name == "set"
    assert Counter(sample.modality for sample in found.samples) == dict.fromkeys(
        ("text", "image", "audio", "mixed"), 15
    )
    assert json.loads((out / "dataset.json").read_text())["sha256"] == receipt.sha256
    assert sorted(receipt.files) == sorted(
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != "dataset.json"
    )


def test_a_set_reads_as_its_source(bundled_set: tuple[Path, Any], tiny_omni: Path) -> None:
    """The same sequences come of the set as of the bundled conversations that it was made of."""
    from omnifp4.calibration.conversations import open_set
    from omnifp4.calibration.encoding import open_reader
    from omnifp4.checkpoint.folder import open_checkpoint

    reader = open_reader(open_checkpoint(tiny_omni))
    pairs = list(zip(open_set(bundled_set[0]).samples, open_set("bundled").samples, strict=True))
    for own, source in pairs[::7]:
        assert own.name == source.name
        assert own.speak == source.speak
        one, other = reader.encode(own), reader.encode(source)
        assert one.sha256 == other.sha256
        assert one.counts == other.counts
        end = one.tensors["input_ids"][0, one.prompt_tokens :].tolist()
        assert end
        assert reader._processor.tokenizer.decode(end[:-1]) == source.answer  # type: ignore[attr-defined]
        assert reader._processor.tokenizer.decode(end[-1:]) == "<|im_end|>"  # type: ignore[attr-defined]


def test_the_choice(bundled_set: tuple[Path, Any]) -> None:
    from omnifp4.calibration.conversations import open_set

    names = [[one.name for one in open_set("bundled", samples=12, seed=seed).samples] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    every = open_set("bundled", samples=188).samples
    assert len({one.name for one in every}) == 188
    with pytest.raises(OmniFP4Error, match="holds 60 conversations, and 61 are asked for"):
        open_set(bundled_set[0], samples=61)


def test_bundled_conversations_are_not_the_evaluations() -> None:
    """Who calibrates with what he is judged by judges himself."""
    import hashlib
    from importlib.resources import files

    from omnifp4.calibration.conversations import bundled_file
    from omnifp4.evaluation.data import read_data

    mine = {hashlib.sha256(path.read_bytes()).digest() for path in bundled_file().parent.glob("*.[pf]*")}
    others = Path(str(files("omnifp4.evaluation") / "samples"))
    theirs = {hashlib.sha256(path.read_bytes()).digest() for path in others.glob("*.[pw]*")}
    assert len(mine) > 60
    assert len(theirs) > 60
    assert not mine & theirs
    ours, judged = (
        {one.answer for one in read_data(path) if len(one.answer or "") > 30} for path in (bundled_file(), "bundled")
    )
    assert len(ours) > 40
    assert not ours & judged


def test_a_file_of_ones_own(write_lines: Callable[..., Path], tmp_path: Path, tiny_omni: Path) -> None:
    from omnifp4 import dataset
    from omnifp4.calibration.conversations import bundled_file, open_set

    picture = next(bundled_file().parent.glob("digit_*.png"))
    shutil.copy(picture, tmp_path / "Mine.PNG")
    parts = [{"type": "image", "image": "Mine.PNG"}, {"type": "text", "text": "What is it?"}]
    data = write_lines(
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], "answer": "3"},
        {"id": "a", "messages": [{"role": "user", "content": parts}], "answer": "3", "task": "digit", "speak": True},
        {"messages": "Hello"},
    )
    receipt = dataset(tmp_path / "out", source=data, model=tiny_omni)
    assert (receipt.conversations, receipt.spoken, receipt.source, receipt.counted_by) == (
        3,
        1,
        "data.jsonl",
        tiny_omni.name,
    )
    # The picture is there once, whatever it was called.
    assert len(list((tmp_path / "out" / "media").iterdir())) == 1
    (tmp_path / "Mine.PNG").unlink()
    found = open_set(tmp_path / "out").samples
    assert [(one.modality, one.answer, one.speak) for one in found] == [
        ("image", "3", False), ("image", "3", True), ("text", None, False),
    ]  # fmt: skip
    assert [one.task for one in found] == ["", "digit", ""]
    only = dataset(tmp_path / "texts", source=write_lines({"messages": "Hi"}, {"messages": "Ho"}), modalities=["text"])
    assert [(one.modality, one.conversations) for one in only.modalities] == [("text", 2)]


def test_refusals(write_lines: Callable[..., Path], tmp_path: Path) -> None:
    from omnifp4 import dataset

    out = tmp_path / "out"
    (tmp_path / "torn.wav").write_bytes(b"RIFF and no more")
    torn = [{"role": "user", "content": [{"type": "audio", "audio": "torn.wav"}]}]
    for data, options, told in (
        (write_lines({"id": "x", "messages": torn}, name="1"), {}, "'x': missing or damaged media: .*torn.wav"),
        (write_lines(name="2"), {}, "holds no samples"),
        (write_lines({"messages": "Hi"}, name="3"), {"samples": 2}, "holds 1 conversations, and 2 are asked for"),
        (write_lines({"messages": "Hi"}, name="4"), {"modalities": ["audio"]}, "holds no conversation with audio"),
        (write_lines({"messages": "Hi"}, name="5"), {"modalities": ["smell"]}, "modality 'smell' is not known"),
        (write_lines({"messages": "Hi"}, name="6"), {"samples": 0}, "--samples is 0"),
        (tmp_path / "missing", {}, "cannot be read as JSONL"),
    ):
        with pytest.raises(OmniFP4Error, match=told):
            dataset(out, source=data, **options)
        assert not out.exists()
        assert not out.with_name("out.partial").exists()
    out.mkdir()
    with pytest.raises(OmniFP4Error, match="exists already"):
        dataset(out)


def _remove_medium(folder: Path) -> None:
    next((folder / "media").iterdir()).unlink()


def _change_line(folder: Path) -> None:
    path = folder / "conversations.jsonl"
    path.write_text(path.read_text().replace("Which", "What", 1))


def _other_version(folder: Path) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"set_version": 9}))


def _unknown_key(folder: Path) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 9}))


def _other_lines_without_a_digest(folder: Path) -> None:
    path = folder / "dataset.json"
    value = json.loads(path.read_text())
    value["files"].pop("conversations.jsonl")
    path.write_text(json.dumps(value))
    (folder / "conversations.jsonl").write_text('{"messages": "Hi"}\n')


def _other_digest(folder: Path) -> None:
    _change_line(folder)
    path = folder / "dataset.json"
    value = json.loads(path.read_text())
    value["files"]["conversations.jsonl"] = sha256((folder / "conversations.jsonl").read_bytes()).hexdigest()
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_other_lines_without_a_digest, "dataset.json: was changed after the set was made"),
        (_other_digest, "dataset.json: was changed after the set was made"),
        (_remove_medium, "file 'media/.*' of the set is missing"),
        (_change_line, "file 'conversations.jsonl' was changed"),
        (_other_version, "a set of version 9; this omnifp4 reads 1"),
        (_unknown_key, "dataset.json: is damaged"),
        (lambda folder: (folder / "dataset.json").unlink(), "is no calibration set"),
    ],
)
def test_a_set_that_was_changed(bundled_set: tuple[Path, Any], tmp_path: Path, damage: Any, told: str) -> None:
    from omnifp4.calibration.conversations import open_set

    copy = Path(shutil.copytree(bundled_set[0], tmp_path / "set"))
    damage(copy)
    with pytest.raises(OmniFP4Error, match=told):
        open_set(copy)


def test_a_set_is_a_source(bundled_set: tuple[Path, Any], tmp_path: Path) -> None:
    from omnifp4 import dataset

    receipt = dataset(tmp_path / "part", source=bundled_set[0], samples=4)
    assert (receipt.source, receipt.conversations) == ("set", 4)
    copy = Path(shutil.copytree(bundled_set[0], tmp_path / "copy"))
    _change_line(copy)
    with pytest.raises(OmniFP4Error, match=r"'conversations.jsonl' was changed"):
        dataset(tmp_path / "other", source=copy)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is named, not the medium that was being copied into it."""
    from omnifp4 import dataset
    from omnifp4.calibration import conversations

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(conversations.shutil, "copyfile", full)
    out = tmp_path / "out"
    with pytest.raises(
        OmniFP4Error, match=r"out: cannot be written: No space left on device \(free some space"
    ) as error:
        dataset(out, modalities=["image"], samples=1)
    assert "png" not in str(error.value)
    assert not out.exists()
