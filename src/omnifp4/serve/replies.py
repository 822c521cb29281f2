"""Answers in OpenAI's forms: whole, and in pieces."""

from __future__ import annotations

import base64
import json
import secrets
import time
from typing import Any, Final

from omnifp4.chat.answer import SAMPLING_RATE, FinishReason

CODE_RATE: Final = 12.5
"""Frames of speech codes a second; each counts as one audio token."""

AUDIO_SECONDS_KEPT: Final = 86_400
"""Of the transcript of a spoken answer, told as its ``expires_at``."""

_REASONS: Final[dict[FinishReason, str]] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "interrupted": "stop",
}

_ENCODE: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_PLACE: Final = "\0text\0"
"""Stands for the text in the form of a chunk; no model's name has it."""

DONE: Final = b"data: [DONE]\n\n"
STILL_HERE: Final = b": waiting\n\n"
"""A comment, so that proxies keep a quiet stream open."""


class ChatReply:
    """One answer of ``/v1/chat/completions`` as it is written."""

    def __init__(self, model: str, prompt_tokens: int, audio_prompt_tokens: int, *, spoken: bool) -> None:
        """`spoken`: text goes into ``audio.transcript``, as OpenAI's spoken answers have it."""
        self.audio_id = f"audio_{secrets.token_hex(12)}"
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._audio_prompt_tokens = audio_prompt_tokens
        self._spoken = spoken
        # Written once for each answer: with many answers at once, each token's share of the processor is what counts.
        whole = self._text_chunk(_PLACE)
        self._before_text, _, self._after_text = whole.partition(_ENCODE(_PLACE).encode())

    def opening(self) -> bytes:
        """The first chunk."""
        return self._chunk(
            {"role": "assistant", "audio": {"id": self.audio_id}}
            if self._spoken
            else {"role": "assistant", "content": ""}
        )

    def text(self, piece: str) -> bytes:
        return self._before_text + _ENCODE(piece).encode() + self._after_text

    def sound(self, data: bytes) -> bytes:
        return self._chunk({"audio": {"id": self.audio_id, "data": base64.b64encode(data).decode()}})

    def closing(self, reason: FinishReason) -> bytes:
        """The last chunk with a choice."""
        delta: dict[str, Any] = {"audio": {"id": self.audio_id, "expires_at": self._expires}} if self._spoken else {}
        return self._chunk(delta, _REASONS[reason])

    def usage_chunk(self, new_tokens: int, samples: int) -> bytes:
        return self._event({"choices": [], "usage": self.usage(new_tokens, samples)})

    def usage(self, new_tokens: int, samples: int) -> dict[str, Any]:
        """OpenAI's count; `samples` of speech at 24 kHz."""
        sound = round(samples / SAMPLING_RATE * CODE_RATE)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new_tokens + sound,
            "total_tokens": self._prompt_tokens + new_tokens + sound,
            "prompt_tokens_details": {"audio_tokens": self._audio_prompt_tokens, "cached_tokens": 0},
            "completion_tokens_details": {"audio_tokens": sound, "reasoning_tokens": 0},
        }

    def whole(
        self, text: str, reason: FinishReason, new_tokens: int, audio: bytes | None, samples: int
    ) -> dict[str, Any]:
        """The answer in one piece; `audio` is an encoded file."""
        message: dict[str, Any] = {"role": "assistant", "content": None if self._spoken else text, "refusal": None}
        if self._spoken:
            message["audio"] = {
                "id": self.audio_id,
                "data": base64.b64encode(audio or b"").decode(),
                "expires_at": self._expires,
                "transcript": text,
            }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _REASONS[reason]}
        usage = self.usage(new_tokens, samples)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    @property
    def _expires(self) -> int:
        return int(time.time()) + AUDIO_SECONDS_KEPT

    def _text_chunk(self, piece: str) -> bytes:
        return self._chunk(
            {"audio": {"id": self.audio_id, "transcript": piece}} if self._spoken else {"content": piece}
        )

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return self._event({"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

    def _event(self, fields: dict[str, Any]) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", **fields})


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _ENCODE(value).encode() + b"\n\n"
