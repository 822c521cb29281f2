"""Digits in other forms keep their digit, and the card says what the results say."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")


def test_pictures_keep_their_ink(data: Any) -> None:
    from PIL import Image

    from training import forms

    one = data.pictures[0]
    for name, form in forms.PICTURES.items():
        made = form(one)
        if isinstance(made, bytes):
            assert made[:2] == b"\xff\xd8", name
            continue
        if "margin" in name:
            made = made.crop((16, 16, 96, 96))
        grey = np.asarray(made.convert("L").resize((8, 8), Image.Resampling.BOX), float).ravel()
        sign = -1 if "inverted" in name else 1
        likeness = sign * np.corrcoef(grey, one.ravel())[0, 1]
        assert likeness > 0.9, name
    assert forms.PICTURES["96x128 stretched"](one).size == (96, 128)


def test_recordings_keep_their_length_and_loudness(data: Any) -> None:
    from training import forms

    one = data.recording(0)
    seconds = len(one) / 8000
    for rate in (8000, 16000, 44100):
        wave = forms.at_rate(one, rate)
        assert len(wave) / rate == pytest.approx(seconds, abs=1e-3)
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(np.sqrt(np.mean(one**2)), rel=1e-2)
    samples, rate = forms.SOUNDS["1 s around"](one)
    assert len(samples) / rate == pytest.approx(seconds + 2, abs=1e-3)
    assert not samples[:rate].any()
    noisy, plain = (forms.SOUNDS[name](one)[0] for name in ("noise -40 dB", "16 kHz"))
    ratio = np.sqrt(np.mean((noisy - plain) ** 2) / np.mean(plain**2))
    assert ratio == pytest.approx(0.01, rel=0.05)


def test_the_card_has_what_the_results_have(data: Any) -> None:
    from training import card

    results = json.loads((files("omnifp4.tiny") / "weights" / "results.json").read_text())
    lines = list(card.tables(results, data))
    picture = results["thinker in BF16"]["picture"]
    assert f"| which digit is in the picture | {picture:.1%} |" in lines
    assert sum(line.startswith("| layer ") for line in lines) == len(results["activations"])
    perplexity = results["thinker in BF16"]["perplexity per token"]
    assert any(line.startswith(f"Perplexity of held-out text: {perplexity:.1f} per token") for line in lines)
