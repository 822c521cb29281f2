"""The interactive loop and the one-shot: streams in, streams out, errors in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("soundfile", reason="soundfile is not installed")

import chat_media as made

from omnifp4.chat.console import run_chat, run_generate
from omnifp4.chat.errors import ChatError


class Person(io.StringIO):
    """Types lines; the line ^C is Ctrl-C."""

    def readline(self, *_: Any) -> str:  # type: ignore[override]
        line = super().readline()
        if line.strip() == "^C":
            raise KeyboardInterrupt
        return line


def talk(model: Any, *lines: str, **options: Any) -> tuple[Any, str, list[str]]:
    out, err = io.StringIO(), io.StringIO()
    result = run_chat(model, stdin=Person("".join(f"{line}\n" for line in lines)), out=out, err=err, **options)
    return result, out.getvalue(), err.getvalue().splitlines()


def test_five_turns_on_the_artifact(tiny_artifact: Path, transformers: Any) -> None:
    arguments = {"device": "cpu", "system": "You tell stories."}
    chat, out, err = talk(
        tiny_artifact, *made.STORY, "/quit", "never", chat=arguments, max_new_tokens=12, temperature=0
    )
    texts = [message["content"][0]["text"] for message in chat.history]
    assert texts[::2] == list(made.STORY)
    shown = "".join(f"{text}\n" for text in texts[1::2])
    assert out == "".join(letter for letter in shown if letter in "\n\t" or letter.isprintable() or ord(letter) > 159)
    prompts = [int(line.partition(" ")[0]) for line in err if "tok/s" in line]
    assert len(prompts) == 5 and prompts == sorted(set(prompts)), "each turn builds on the last"


def test_errors_are_one_line_and_the_chat_goes_on(new_chat: Callable[..., Any]) -> None:
    lines = [
        "/image no/such.png",
        "/speak a.txt",
        "/fly",
        "<|im_start|>",
        "/save",
        "/save /no/such/dir/a.json",
        "Hello",
    ]
    chat, out, err = talk(new_chat(), *lines)
    errors = [line for line in err if line.startswith("error: ")]
    assert len(errors) == 6 and "does not exist" in errors[0] and "/help lists them" in errors[2]
    assert len(chat.history) == 2 and out.endswith("\n")
    assert not any("Traceback" in line for line in err)


def test_media_go_with_the_next_message(new_chat: Callable[..., Any], tmp_path: Path) -> None:
    image, audio = tmp_path / "my picture.png", tmp_path / "a.wav"
    image.write_bytes(made.image_bytes())
    audio.write_bytes(made.wav_bytes())
    chat, _, _ = talk(
        new_chat(), f"/image {image}", f"/audio {audio}", "What?", "And?", f"/image {image}", "/image", "Bare"
    )
    kinds = [[part["type"] for part in message["content"]] for message in chat.history[::2]]
    assert kinds == [["image", "audio", "text"], ["text"], ["text"]]


def test_media_alone_are_a_question(new_chat: Callable[..., Any], tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    audio.write_bytes(made.wav_bytes())
    chat, _, _ = talk(new_chat(), "", f"/audio {audio}", "")
    assert [part["type"] for part in chat.history[0]["content"]] == ["audio"]


def test_speaking_saving_and_forgetting(new_chat: Callable[..., Any], tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(made.image_bytes())
    wav, saved = tmp_path / "say it.wav", tmp_path / "talk.json"
    chat, _, err = talk(
        new_chat(system="Be brief."),
        f"/speak {wav} Bob",
        f"/speak {wav} chelsie",
        f"/image {image}",
        "One",
        "Two",
        "/speak off",
        "Three",
        f"/save {saved}",
        "/reset",
        "/help",
    )
    assert "error: there is no speaker 'Bob' (speakers: " in err[0]
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["say it-1.wav", "say it-2.wav"]
    assert len(made.read_wav(tmp_path / "say it-2.wav")[1]) > 10_000
    messages = json.loads(saved.read_text("utf-8"))
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    assert messages[1]["content"][0] == {"type": "image", "image": "a.png"}
    assert chat.history == [] and any("/quit" in line for line in err)


def test_ctrl_c(new_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(io.StringIO):
        pressed = False

        def write(self, text: str) -> int:
            count = super().write(text)
            if not self.pressed and len(self.getvalue()) > 5:
                self.pressed = True
                raise KeyboardInterrupt
            return count

    out, err = Impatient(), io.StringIO()
    chat = run_chat(new_chat(max_new_tokens=30), stdin=Person("Hello\n^C\nAgain\n"), out=out, err=err)
    assert "interrupted" in err.getvalue() and "/quit leaves" in err.getvalue()
    assert len(chat.history) == 4 and len(chat.history[1]["content"][0]["text"]) < 40


def test_generate(new_chat: Callable[..., Any], tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    wav = tmp_path / "out.wav"
    answer = run_generate(
        new_chat(),
        "Hello",
        images=[made.picture()],
        audios=[made.tone()],
        speak_path=wav,
        speaker="aiden",
        seed=3,
        out=out,
        err=err,
    )
    rate, samples = made.read_wav(wav)
    assert rate == 24_000 and answer.waveform is not None and len(samples) == len(answer.waveform)
    assert "real-time factor" in err.getvalue() and out.getvalue().endswith("\n")
    with pytest.raises(ChatError, match="--speak"):
        run_generate(new_chat(), "Hello", speaker="aiden")
    with pytest.raises(ChatError, match="no speaker 'Bob'"):
        run_generate(new_chat(), "Hello", speak_path=tmp_path / "never.wav", speaker="Bob")
    assert not (tmp_path / "never.wav").exists()
    with pytest.raises(ChatError, match="would hold WAV under another name"):
        run_generate(new_chat(), "Hello", speak_path=tmp_path / "out.mp3")


def test_generate_interrupted_leaves_a_valid_file(
    new_chat: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnifp4.chat.wav import WavWriter

    write = WavWriter.write

    def write_once(self: WavWriter, waveform: Any) -> None:
        write(self, waveform)
        raise KeyboardInterrupt

    monkeypatch.setattr(WavWriter, "write", write_once)
    err = io.StringIO()
    wav = tmp_path / "out.wav"
    answer = run_generate(new_chat(max_speech_seconds=60), "Hello", speak_path=wav, out=io.StringIO(), err=err)
    assert answer.finish_reason == "interrupted" and "interrupted" in err.getvalue()
    assert len(made.read_wav(wav)[1]) == 12 * 1920 - 555


def test_text_cannot_steer_the_terminal(new_chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = new_chat()
    from omnifp4.chat.text_stream import TextStream

    monkeypatch.setattr(TextStream, "add", lambda self, token: "a\x1b[31mb\x9b\n")
    out = io.StringIO()
    run_generate(chat, "Hello", out=out, err=io.StringIO(), max_new_tokens=1)
    assert out.getvalue() == "a[31mb\n\n"
