"""Behind ``omnifp4 generate`` and ``omnifp4 chat``: plain functions over streams.

Answers go to ``out``, talk about them to ``err``. An error is one line and the chat goes on.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from omnifp4.chat.answer import Answer
from omnifp4.chat.errors import ChatError
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.chat.wav import WavWriter
from omnifp4.errors import OmniFP4Error

HELP = """\
/image FILE    show an image with the next message (also /audio, /video; without FILE: forget them)
/speak FILE    say the next answers, numbered from FILE; /speak off ends it; /speak FILE NAME chooses a speaker
/save FILE     write the conversation as JSON
/reset         forget the conversation
/help          this list
/quit          leave (also Ctrl-D); Ctrl-C ends an answer"""

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
"""Characters with which a text could steer a terminal."""


def run_generate(
    model: Any,
    prompt: str | None,
    *,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    speak_path: str | Path | None = None,
    speaker: str | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
    chat: dict[str, Any] | None = None,
    **options: Any,
) -> Answer:
    """Asks once: text to `out` as it is made, speech to a file.

    Args:
        model: an `OmniChat`, a folder, a Hub id, or a loaded model.
        prompt: the question; None where media say it all.
        images: sources.
        audios: sources.
        videos: sources.
        speak_path: WAV file of the speech; valid at every moment, also after Ctrl-C.
        speaker: who speaks; only with `speak_path`.
        out: for the text; None takes standard output.
        err: for figures and notes; None takes standard error.
        chat: arguments of `OmniChat`, where `model` is not one.
        **options: see `Options`.

    Returns:
        The answer.

    Raises:
        OmniFP4Error: the one line to show.
    """
    out, err = out or sys.stdout, err or sys.stderr
    if speaker is not None and speak_path is None:
        raise ChatError(f"the speaker {speaker!r} needs a file to speak to", hint="--speak out.wav")
    if speak_path is not None and Path(speak_path).suffix.lower() not in ("", ".wav"):
        raise ChatError(f"{str(speak_path)!r} would hold WAV under another name", hint="--speak out.wav")
    talk = model if isinstance(model, OmniChat) else OmniChat(model, **(chat or {}))
    media = {"images": list(images), "audios": list(audios), "videos": list(videos)}
    return _ask(talk, prompt, media, speak_path, speaker, out, err, options)


@dataclass
class _Console:
    chat: OmniChat
    out: TextIO
    err: TextIO
    options: dict[str, Any]
    media: dict[str, list[Any]] = field(default_factory=lambda: {"images": [], "audios": [], "videos": []})
    speak_path: Path | None = None
    speaker: str | None = None
    spoken: int = 0


def run_chat(
    model: Any,
    *,
    stdin: TextIO | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
    chat: dict[str, Any] | None = None,
    **options: Any,
) -> OmniChat:
    """Talks until ``/quit`` or the end of input.

    Args:
        model: as in `run_generate`.
        stdin: lines of the person; None takes standard input.
        out: for answers.
        err: for all else.
        chat: arguments of `OmniChat`, where `model` is not one.
        **options: of every answer, see `Options`.

    Returns:
        The chat, with its history.
    """
    stdin, out, err = stdin or sys.stdin, out or sys.stdout, err or sys.stderr
    talk = model if isinstance(model, OmniChat) else OmniChat(model, **(chat or {}))
    console = _Console(talk, out, err, options)
    person = stdin.isatty()
    if person:
        print("/help lists the commands", file=err)
    while True:
        try:
            if person:
                print("> ", end="", file=err, flush=True)
            line = stdin.readline()
            if not line or line.strip() in ("/quit", "/exit"):
                return talk
            _line(console, line.rstrip("\r\n"))
        except KeyboardInterrupt:
            print("\n/quit leaves", file=err)
        except OmniFP4Error as error:
            print(f"error: {error}", file=err)


def _line(console: _Console, line: str) -> None:
    words = line.strip()
    if words.startswith("/"):
        command, _, rest = words.partition(" ")
        _command(console, command, rest.strip())
        return
    if not words and not any(console.media.values()):
        return
    path = None
    if console.speak_path is not None:
        path = console.speak_path.with_stem(f"{console.speak_path.stem}-{console.spoken + 1}")
    # Media that cannot be read would fail again with every message.
    media, console.media = console.media, {kind: [] for kind in console.media}
    _ask(console.chat, line or None, media, path, console.speaker, console.out, console.err, console.options)
    console.spoken += path is not None


def _command(console: _Console, command: str, rest: str) -> None:
    chat, err = console.chat, console.err
    kind = f"{command[1:]}s"
    if command == "/help":
        print(HELP, file=err)
    elif kind in console.media:
        if not rest:
            console.media[kind] = []
        else:
            # Read now, so that what is wrong with it is said now.
            chat.read([{"role": "user", "content": [{"type": command[1:], command[1:]: rest}]}])
            console.media[kind].append(rest)
            print(f"{command[1:]} {rest}: goes with the next message", file=err)
    elif command == "/reset":
        chat.reset()
        print("the conversation is forgotten", file=err)
    elif command == "/speak":
        _speak(console, rest)
    elif command == "/save":
        if not rest:
            raise ChatError("/save needs a file")
        save(chat, rest)
        print(f"{len(chat.history)} messages written to {rest}", file=err)
    else:
        raise ChatError(f"there is no command {command!r}", hint="/help lists them")


def _speak(console: _Console, rest: str) -> None:
    if rest == "off":
        console.speak_path = None
        print("answers are written only", file=console.err)
        return
    path, _, name = rest.rpartition(" ") if not rest.endswith(".wav") else (rest, "", "")
    if not path.endswith(".wav"):
        raise ChatError("/speak needs a .wav file", hint=f"speakers: {', '.join(console.chat.speakers) or 'none'}")
    console.chat.speaker(name or True)
    console.speak_path, console.speaker = Path(path), name or None
    print(f"answers are spoken to {Path(path).stem}-1.wav and so on", file=console.err)


def _ask(
    chat: OmniChat,
    prompt: str | None,
    media: dict[str, list[Any]],
    speak_path: str | Path | None,
    speaker: str | None,
    out: TextIO,
    err: TextIO,
    options: dict[str, Any],
) -> Answer:
    def show(text: str) -> None:
        out.write(text.translate(_CONTROL))
        out.flush()

    wanted: bool | str = speak_path is not None and (speaker or True)
    chat.speaker(wanted)
    with ExitStack() as stack:
        wav = stack.enter_context(WavWriter(speak_path)) if speak_path is not None else None
        answer = chat.ask(
            prompt, **media, speak=wanted, on_text=show, on_speech=wav.write if wav is not None else None, **options
        )
    with contextlib.suppress(OSError):
        out.write("\n")
        out.flush()
    if answer.finish_reason == "interrupted":
        print("interrupted", file=err)
    if wav is not None and not wav.samples and answer.finish_reason != "interrupted":
        print(f"there was nothing to say: {wav.path} is empty", file=err)
    print(answer.stats.line(), file=err)
    return answer


def save(chat: OmniChat, path: str | Path) -> None:
    """Writes a conversation as JSON: text as it is, media by name.

    Raises:
        ChatError: the file cannot be written.
    """
    messages: list[dict[str, Any]] = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    for message in chat.history:
        parts = [
            part if part["type"] == "text" else {"type": part["type"], part["type"]: part["name"]}
            for part in message["content"]
        ]
        messages.append({"role": message["role"], "content": parts})
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(json.dumps(messages, ensure_ascii=False, indent=2) + "\n", "utf-8")
        partial.replace(target)
    except OSError as error:
        raise ChatError(f"cannot write {target}: {error.strerror or error}") from error
