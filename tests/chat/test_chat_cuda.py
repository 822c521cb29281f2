"""Chat and speech with a packed checkpoint on a GPU."""

# ruff: noqa: E402 - what is not installed skips the file first
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import chat_media as made

from omnifp4.chat.answer import SpeechPiece
from omnifp4.chat.omni_chat import OmniChat
from omnifp4.chat.session import StepSession

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def test_packed_chat_and_speech(tiny_artifact: Path, processor: Any) -> None:
    chat = OmniChat(tiny_artifact, device="cuda", max_new_tokens=12, temperature=1.0, max_speech_seconds=3.0)
    assert chat.device.type == "cuda"
    state = torch.cuda.get_rng_state()
    media = {"images": made.picture(), "audios": made.tone(), "videos": [[made.picture()] * 4]}
    answer = chat.ask("What do you see and hear?", **media, speak="Chelsie")
    again = OmniChat(chat.model, processor=chat.processor).ask(
        "What do you see and hear?",
        **media,
        speak="Chelsie",
        max_new_tokens=12,
        temperature=1.0,
        max_speech_seconds=3.0,
    )
    assert torch.equal(state, torch.cuda.get_rng_state()), "the program's own random numbers are left alone"
    assert answer.tokens == again.tokens
    assert answer.waveform is None or (answer.waveform == again.waveform).all()
    assert answer.stats.peak_where == "cuda" and answer.stats.peak_bytes > 0
    events = list(chat.stream("Go on.", speak=True))
    spoken = [event.waveform for event in events if isinstance(event, SpeechPiece)]
    if spoken:
        assert (np.concatenate(spoken) == events[-1].waveform).all()
    session = StepSession(chat)
    step = session.start("Hello")
    while not step.finished:
        session.step(step, 5)
    assert session.finish(step).tokens == chat.complete("Hello").tokens
