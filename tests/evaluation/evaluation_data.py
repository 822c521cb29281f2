"""A few samples of every modality, as lines of data."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

SAMPLES = Path(str(files("omnifp4.evaluation").joinpath("samples")))


def line(name: str, text: str, **more: Any) -> dict[str, Any]:
    """One line of data; media among `more`."""
    parts = [{"type": kind, kind: str(SAMPLES / more.pop(kind))} for kind in ("image", "audio") if kind in more]
    return {"id": name, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **more}


FEW = (
    line("read", "The sun is warm today and the wind comes from the south.", answer=" It is a good day to walk."),
    line("unanswered", "A text without an answer is scored itself."),
    line("picture", "Which digit?", image="3_219.png", answer="3", task="picture digit"),
    line("sound", "Which digit?", audio="7_theo_1.wav", answer="7", task="spoken digit", speak=True),
    line("both", "Add them.", image="3_219.png", audio="7_theo_1.wav", answer="10", task="add two"),
)
