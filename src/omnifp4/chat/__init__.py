"""Conversation with an omni model: text, image, audio and video in, text and speech out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnifp4.chat.answer import Answer, SpeechPiece, Stats, TextPiece
    from omnifp4.chat.media import MediaRules
    from omnifp4.chat.omni_chat import OmniChat
    from omnifp4.chat.session import StepSession

_HOMES = {
    "Answer": "answer",
    "MediaRules": "media",
    "OmniChat": "omni_chat",
    "SpeechPiece": "answer",
    "Stats": "answer",
    "StepSession": "session",
    "TextPiece": "answer",
}

__all__ = ["Answer", "MediaRules", "OmniChat", "SpeechPiece", "Stats", "StepSession", "TextPiece"]


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"omnifp4.chat.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
