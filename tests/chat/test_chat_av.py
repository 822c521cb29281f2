"""Sound and video that PyAV reads: forms that its own frames cannot be trusted with."""
# ruff: noqa: E402 - what is not installed skips the file first

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _needed in ("soundfile", "soxr", "av"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed")

import chat_media as made

from omnifp4.chat.errors import MediaError
from omnifp4.chat.media import MediaRules, load_media


def load(kind: str, source: Any) -> Any:
    ((message,), _) = load_media([{"role": "user", "content": [{"type": kind, kind: source}]}], MediaRules())
    return message["content"][0][kind]


def test_sound_of_many_channels(tmp_path: Path) -> None:
    """Of planes beside each other PyAV would read one too many, behind the frame, and the process would end."""
    for name, codec, layout, channels in (("a.mka", "aac", "7.1", 8), ("p.mka", "pcm_f32le", "7.1.4", 12)):
        path = made.sound_file(tmp_path / name, codec, 48_000, layout)
        for _ in range(20):
            samples = load("audio", path)
            assert np.median(samples) == pytest.approx(0.25 / channels, rel=0.1), "one channel sounds"
            assert 8_000 <= len(samples) < 9_000


def test_sound_that_changes_its_form(tmp_path: Path) -> None:
    """One stream put behind another: a rate that is wrong for the rest would be heard as another voice."""
    first = made.sound_file(tmp_path / "a.aac", "aac", 48_000, "stereo").read_bytes()
    second = made.sound_file(tmp_path / "b.aac", "aac", 24_000, "mono").read_bytes()
    assert len(load("audio", first)) > 8_000
    with pytest.raises(MediaError, match="of several pieces: 2 channels at 48000 become 1 at 24000"):
        load("audio", first + second)


@pytest.mark.parametrize(("kind", "known"), [("audio", b"A_PCM/FLOAT/IEEE"), ("video", b"V_MPEG4/ISO/ASP")])
def test_codecs_that_nobody_knows(tmp_path: Path, kind: str, known: bytes) -> None:
    path = tmp_path / "m.mkv"
    if kind == "audio":
        made.sound_file(path, "pcm_f32le", 48_000, "mono")
    else:
        made.video_file(path)
    data = path.read_bytes()
    assert known in data
    with pytest.raises(MediaError, match="coded in a way that is not known here"):
        load(kind, data.replace(known, known[:2] + b"X" * (len(known) - 2)))


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """Four hundred, seeded: whatever a decoder makes of them, the process and the chat go on."""
    draw = np.random.default_rng(3)
    sound = made.sound_file(tmp_path / "a.aac", "aac", 48_000, "stereo", seconds=0.2).read_bytes()
    matroska = made.sound_file(tmp_path / "a.mka", "pcm_f32le", 24_000, "5.1", seconds=0.1).read_bytes()
    video = made.video_file(tmp_path / "v.mp4", seconds=0.5, sound=True).read_bytes()
    whole = (("audio", sound), ("audio", matroska), ("audio", made.wav_bytes(0.1)), ("video", video))
    read = 0
    for number in range(400):
        kind, data = whole[number % len(whole)]
        damaged = np.frombuffer(data, np.uint8).copy()
        begin = draw.integers(len(damaged)) if number % 3 else draw.integers(min(400, len(damaged)))
        damaged[begin : begin + draw.integers(1, 9)] = draw.choice([0, 127, 128, 255, draw.integers(256)])
        try:
            load(kind, damaged.tobytes()[: draw.integers(1, len(damaged)) if number % 5 == 0 else None])
        except MediaError as refused:
            assert "\n" not in str(refused)
        else:
            read += 1
    assert 40 < read < 360, "both happen"
