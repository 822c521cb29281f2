"""What the trained model can do, on held-out pictures and recordings, in BF16 and in FP4 by the default recipe."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_reading import read_bits, read_header

from omnifp4.models import layout_for
from omnifp4.tiny import trained_config, write_tiny_omni
from omnifp4.tiny.trained import trained_bytes, trained_shapes

PICTURES, RECORDINGS = 40, 40
"""So many of each; the recordings are of all six speakers."""

Digits = list[tuple[Path, str]]
"""Files and the digits in them."""


@pytest.fixture(scope="module")
def held_out() -> dict[str, Digits]:
    """Bundled samples that the model never learned from: pictures, and recordings of all six speakers."""
    from omnifp4.evaluation.data import BUNDLED, read_data

    found: dict[str, Digits] = {"picture digit": [], "spoken digit": []}
    for sample in read_data(BUNDLED):
        if sample.task in found:
            part = next(one for one in sample.messages[-1]["content"] if one["type"] != "text")
            found[sample.task].append((Path(part[part["type"]]), str(sample.answer)))
    recordings = sorted(found["spoken digit"], key=lambda one: (one[0].stem[2:], one[0].stem))
    return {"picture": found["picture digit"][:PICTURES], "sound": recordings[:: len(recordings) // RECORDINGS]}


@pytest.fixture(scope="module")
def trained_artifact(trained_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omnifp4 import quantize

    out = tmp_path_factory.mktemp("trained") / "nvfp4"
    quantize(trained_omni, out, threads=2)
    return out


@pytest.fixture(scope="module")
def open_chat(trained_omni: Path, trained_artifact: Path) -> Callable[[str], Any]:
    """Conversations that start anew, with the model in BF16 or in FP4; each is loaded once."""
    for needed in ("torch", "transformers", "torchvision", "PIL", "soundfile", "soxr"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"talking needs {needed}, which is not installed")
    from omnifp4.chat import OmniChat

    folders = {"bf16": trained_omni, "nvfp4": trained_artifact}
    opened: dict[str, Any] = {}

    def open_one(name: str) -> Any:
        if name not in opened:
            opened[name] = OmniChat(str(folders[name]), device="cpu", temperature=0.0, max_new_tokens=4)
        opened[name].reset()
        return opened[name]

    return open_one


def answer(chat: Any, text: str, **media: Any) -> str:
    chat.reset()
    return str(chat.ask(text, **media).text).strip()


def right(chat: Any, held_out: dict[str, Digits]) -> dict[str, int]:
    asked = {"picture": ("Which digit is in the picture?", "images"), "sound": ("Which digit is spoken?", "audios")}
    return {
        kind: sum(answer(chat, asked[kind][0], **{asked[kind][1]: str(file)}) == digit for file, digit in digits)
        for kind, digits in held_out.items()
    }


def test_the_files_hold_the_config_s_tensors() -> None:
    layout = layout_for(trained_config())
    assert trained_shapes() == {one.name: one.shape for one in layout.tensors if not one.optional}
    assert sum(len(trained_bytes(name)) for name in ("thinker.safetensors", "speech.safetensors")) <= 25_000_000


def test_the_checkpoint_is_complete(trained_omni: Path, tmp_path: Path) -> None:
    header, start = read_header(trained_omni / "model.safetensors")
    assert header["__metadata__"] == {"format": "pt"}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert start + max(ends) == (trained_omni / "model.safetensors").stat().st_size
    assert json.loads((trained_omni / "config.json").read_text()) == trained_config()
    assert json.loads((trained_omni / "preprocessor_config.json").read_text())["max_pixels"] == 128 * 128
    cut = write_tiny_omni(tmp_path / "cut", shard_bytes=6_000_000)
    assert len(list(cut.glob("*.safetensors"))) > 3
    whole, parts = read_bits(trained_omni), read_bits(cut)
    assert whole.keys() == parts.keys()
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_held_out_digits_are_read_and_heard_also_in_fp4(
    open_chat: Callable[[str], Any], held_out: dict[str, Digits]
) -> None:
    counts = {kind: len(digits) for kind, digits in held_out.items()}
    assert counts == {"picture": PICTURES, "sound": RECORDINGS}
    before, after = (right(open_chat(name), held_out) for name in ("bf16", "nvfp4"))
    assert before["picture"] >= 0.97 * PICTURES
    assert before["sound"] >= 0.97 * RECORDINGS
    # One point of so few is less than one sample.
    for kind, count in counts.items():
        assert after[kind] >= before[kind] - 0.01 * count, kind


def test_two_senses_are_brought_together(open_chat: Callable[[str], Any], held_out: dict[str, Digits]) -> None:
    chat = open_chat("bf16")
    good = 0
    pairs = list(zip(held_out["picture"][:12], held_out["sound"][::3][:12], strict=True))
    for (picture, a), (sound, b) in pairs:
        media = {"images": str(picture), "audios": str(sound)}
        good += answer(chat, "Add the two digits.", **media) == str(int(a) + int(b))
        good += answer(chat, "Which digit is larger?", **media) == max(a, b)
    assert good >= 0.9 * 2 * len(pairs)


def test_it_calculates_and_repeats(open_chat: Callable[[str], Any]) -> None:
    chat = open_chat("bf16")
    assert [answer(chat, f"What is {a} plus {9 - a}?") for a in range(4)] == ["9"] * 4
    assert answer(chat, "Which is larger, 3 or 8?") == "8"
    assert answer(chat, "Repeat: 4 7") == "4 7"


@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_what_it_says_is_understood(name: str, open_chat: Callable[[str], Any]) -> None:
    """By a classifier that knows real recordings only."""
    from omnifp4.evaluation.listening import load_listener

    chat, listen = open_chat(name), load_listener()
    heard = []
    for digit in range(10):
        chat.reset()
        voice = ("Ethan", "Chelsie", "Aiden")[digit % 3]
        said = chat.ask(f"Repeat: {digit}", speak=voice, speech_temperature=0.0, max_speech_seconds=2.0)
        assert said.text.strip() == str(digit)
        assert said.waveform is not None
        heard.append(listen(said.waveform) == str(digit))
    assert sum(heard) >= 9


def picture_forms(file: Path) -> dict[str, Any]:
    """The same digit as other files and arrays would bring it."""
    from PIL import Image, ImageOps

    picture = Image.open(file).convert("L")
    small = picture.resize((8, 8), Image.Resampling.BOX)
    jpeg = io.BytesIO()
    picture.resize((128, 128), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=85)
    return {
        "8 x 8, grey": np.asarray(small),
        "large": picture.resize((224, 224), Image.Resampling.BICUBIC),
        "inverted": ImageOps.invert(picture),
        "jpeg": jpeg.getvalue(),
    }


def sound_forms(file: Path) -> dict[str, Any]:
    """The same recording at other rates, quieter, and with silence around it."""
    import soundfile
    import soxr

    samples, rate = soundfile.read(file, dtype="float32")
    pause = np.zeros(int(0.3 * rate), np.float32)
    return {
        "16 kHz": (soxr.resample(samples, rate, 16_000), 16_000),
        "44.1 kHz": (soxr.resample(samples, rate, 44_100), 44_100),
        "quieter": (samples * 0.3, rate),
        "silence around": (np.concatenate([pause, samples, pause]), rate),
    }


def test_other_forms_of_the_same_digits(open_chat: Callable[[str], Any], held_out: dict[str, Digits]) -> None:
    chat = open_chat("bf16")
    wrong: dict[str, list[str]] = {}
    for kind, forms in (("picture", picture_forms), ("sound", sound_forms)):
        for file, digit in held_out[kind][1::5]:
            for form, value in forms(file).items():
                if kind == "picture":
                    said = answer(chat, "Which digit is in the picture?", images=value)
                else:
                    said = answer(chat, "Which digit is spoken?", audios=[value])
                wrong.setdefault(form, [])
                if said != digit:
                    wrong[form].append(f"{file.name}: {said}")
    assert len(wrong) == 8
    assert all(len(one) <= 1 for one in wrong.values()), wrong
    assert sum(map(len, wrong.values())) <= 2, wrong
