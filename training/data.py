"""The training data: one compressed file, made from folders of open data.

Held out of training, for the tests: recordings with index 0 to 4 of every speaker and digit (300, FSDD's own test
split), every fifth of scikit-learn's pictures (index % 5 == 4: 359), the last twentieth of each text.
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATE = 8000
"""Hertz of the recordings."""
TEST_INDICES = 5
"""Recordings with an index below this are held out."""
TEST_TEXT = 1 / 20
VOICES = {"ethan": "jackson", "chelsie": "george", "aiden": "lucas"}
"""Whose recordings each of the model's voices learned from."""


@dataclass(frozen=True)
class Data:
    """Everything that training reads.

    Attributes:
        pictures: ``(n, 8, 8)`` float32 in [0, 1], ink is 1.
        picture_digits: ``(n,)``.
        waves: int16 samples of all recordings, one after the other.
        wave_ends: ``(n,)`` where each recording ends.
        wave_digits, wave_speakers, wave_indices: ``(n,)``; speakers count into `speakers`.
        speakers: names.
        text, test_text: token ids, uint16.
        test_bytes: UTF-8 bytes of the held-out text.
    """

    pictures: Any
    picture_digits: Any
    waves: Any
    wave_ends: Any
    wave_digits: Any
    wave_speakers: Any
    wave_indices: Any
    speakers: Any
    text: Any
    test_text: Any
    test_bytes: Any

    def picture_numbers(self, test: bool) -> Any:
        return np.flatnonzero((np.arange(len(self.pictures)) % 5 == 4) == test)

    def wave_numbers(self, test: bool) -> Any:
        return np.flatnonzero((self.wave_indices < TEST_INDICES) == test)

    def recording(self, number: int) -> Any:
        """Float32 samples in [-1, 1] at 8 kHz."""
        start = 0 if number == 0 else self.wave_ends[number - 1]
        return self.waves[start : self.wave_ends[number]].astype(np.float32) / 32768


def prepare(recordings: Path, texts: list[Path], tokenizer: Any, out: Path) -> None:
    """Packs the data.

    Args:
        recordings: folder of ``{digit}_{speaker}_{index}.wav``, mono, 16 bit, 8 kHz.
        texts: plain text files, UTF-8.
        tokenizer: the tiny model's.
        out: the file to write.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    waves, labels = [], []
    for path in sorted(recordings.glob("*.wav")):
        digit, speaker, index = path.stem.split("_")
        with wave.open(str(path)) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
                raise SystemExit(f"{path} is not mono 16-bit sound of {RATE} Hz")
            waves.append(np.frombuffer(file.readframes(file.getnframes()), "<i2"))
        labels.append((int(digit), speaker, int(index)))
    if not waves:
        raise SystemExit(f"{recordings} holds no .wav files")
    speakers = sorted({label[1] for label in labels})
    train, test, test_bytes = [], [], 0
    for path in texts:
        text = path.read_text("utf-8")
        cut = text.index("\n", int(len(text) * (1 - TEST_TEXT)))
        train.append(np.array(tokenizer(text[:cut])["input_ids"], np.uint16))
        test.append(np.array(tokenizer(text[cut:])["input_ids"], np.uint16))
        test_bytes += len(text[cut:].encode())
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        pictures=(digits.images / 16).astype(np.float32),
        picture_digits=digits.target.astype(np.int64),
        waves=np.concatenate(waves),
        wave_ends=np.cumsum([len(one) for one in waves]),
        wave_digits=np.array([label[0] for label in labels]),
        wave_speakers=np.array([speakers.index(label[1]) for label in labels]),
        wave_indices=np.array([label[2] for label in labels]),
        speakers=np.array(speakers),
        text=np.concatenate(train),
        test_text=np.concatenate(test),
        test_bytes=np.array(test_bytes),
    )
    partial.replace(out)


def load(path: Path) -> Data:
    """Reads what `prepare` wrote."""
    with np.load(path) as file:
        return Data(**{name: file[name] for name in file.files})


def tokenizer() -> Any:
    """The tiny model's."""
    import tempfile

    from transformers import AutoTokenizer

    from omnifp4.tiny.checkpoint import TINY_FILES, asset_bytes

    with tempfile.TemporaryDirectory() as folder:
        for name in TINY_FILES:
            (Path(folder) / name).write_bytes(asset_bytes(name))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
