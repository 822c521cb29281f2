"""OpenAI's messages to those of `omnifp4.chat.messages`, which then checks what is in them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from omnifp4.chat.messages import Message, normalise
from omnifp4.chat.sources import scheme_of
from omnifp4.serve.errors import ApiError, bad_request
from omnifp4.serve.settings import Settings

PART_TYPES: Final = ("text", "image_url", "input_audio", "audio_url", "video_url")
DETAILS: Final = ("auto", "low", "high", "original")
"""Of a picture, as OpenAI's clients may name them; the processor alone decides how finely a picture is read."""

SYSTEM_ROLES: Final = ("system", "developer")
TOOL_ROLES: Final = ("tool", "function")

_KEYS: Final = frozenset({"role", "content", "name", "audio", "refusal", "annotations", "tool_calls", "function_call"})
"""Of a message, as OpenAI's own answers have them when they are sent back."""

MOST_TRANSCRIPTS: Final = 1_000


class Transcripts:
    """Texts of the latest spoken answers: a client names an earlier one by its id instead of repeating it."""

    def __init__(self, most: int = MOST_TRANSCRIPTS) -> None:
        self._most = most
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, name: str, text: str) -> None:
        with self._lock:
            self._texts[name] = text
            while len(self._texts) > self._most:
                self._texts.popitem(last=False)

    def find(self, name: Any) -> str | None:
        with self._lock:
            return self._texts.get(name) if isinstance(name, str) else None


def read_messages(
    messages: list[dict[str, Any]],
    settings: Settings,
    transcripts: Transcripts,
    *,
    markers: frozenset[str],
    defused: Callable[[str], str],
) -> list[Message]:
    """Checks a conversation and brings it to the form that the chat room reads.

    Args:
        messages: as they were sent.
        settings: what may be reached, and how much.
        transcripts: of earlier spoken answers.
        markers: the tokenizer's special tokens, which text must not contain.
        defused: makes markers that the model itself had spelled harmless.

    Returns:
        Normalised messages, media not read yet.

    Raises:
        ApiError: naming message and part.
        ChatError: the same, from `normalise`.
    """
    limits = settings.limits
    if len(messages) > limits.messages:
        raise bad_request(f"{len(messages)} messages are above the limit of {limits.messages}", "messages")
    media = characters = 0
    plain = []
    for number, message in enumerate(messages):
        if (one := _message(message, number, transcripts, defused)) is None:
            continue
        plain.append(one)
        for place, part in enumerate(one["content"] if isinstance(one["content"], list) else ()):
            media += _check_part(part, f"messages.{number}.content.{place}", settings)
    plain = _with_one_system_message(plain)
    result = normalise(plain, markers=markers)
    for message in result:
        characters += sum(len(part["text"]) for part in message["content"] if part["type"] == "text")
    if media > limits.media:
        raise bad_request(f"{media} images, sounds and videos are above the limit of {limits.media}", "messages")
    if characters > limits.prompt_characters:
        raise bad_request(
            f"the conversation has {characters:,} characters; the limit is {limits.prompt_characters:,}",
            "messages",
            "context_length_exceeded",
        )
    if result[-1]["role"] != "user":
        raise bad_request("the last message must come from the user", "messages")
    return result


def _with_one_system_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clients may begin with several, their own and the developer's; the model knows one."""
    count = next((n for n, one in enumerate(messages) if one["role"] not in SYSTEM_ROLES), len(messages))
    if count < 2:
        return messages
    parts: list[Any] = []
    for one in messages[:count]:
        content = one["content"]
        parts += ["\n\n"] if parts else []
        parts += content if isinstance(content, list) else [content]
    return [{"role": "system", "content": parts}, *messages[count:]]


def has_media(messages: list[Message]) -> bool:
    return any(part["type"] != "text" for message in messages for part in message["content"])


def _message(
    message: Mapping[str, Any], number: int, transcripts: Transcripts, defused: Callable[[str], str]
) -> dict[str, Any] | None:
    """Role and content; None for an earlier answer, or a system message, that was empty."""
    place, role = f"messages.{number}", message.get("role")
    if role in TOOL_ROLES:
        raise bad_request(
            f"{place} has the role {role!r}: tools are not supported", f"{place}.role", "unsupported_value"
        )
    for name in message:
        if name not in _KEYS:
            raise bad_request(f"{place} has the unknown field {str(name)[:80]!r}", place, "unknown_parameter")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise bad_request(f"{place}.{name}: tools are not supported", f"{place}.{name}", "unsupported_value")
    content = message.get("content")
    if role in SYSTEM_ROLES and content in ("", []):
        return None
    if role != "assistant":
        if not isinstance(content, str | list):
            # Before several system messages become one: their numbers are not those of the request after that.
            kind = "missing" if content is None else f"a {type(content).__name__}"
            raise bad_request(
                f"{place}.content is {kind} (allowed: text, or a list of parts)", f"{place}.content", "invalid_value"
            )
        return {"role": role, "content": content}
    spoken = message.get("audio")
    if spoken is not None and not content:
        content = transcripts.find(spoken.get("id") if isinstance(spoken, Mapping) else None)
        if content is None:
            raise bad_request(f"{place}.audio is no answer of this server's", f"{place}.audio", "audio_not_found")
    if isinstance(content, list):
        content = "".join(
            part["text"] if isinstance(part, Mapping) and isinstance(part.get("text"), str) else _no_text(place)
            for part in content
        )
    if content is not None and not isinstance(content, str):
        _no_text(place)
    return {"role": "assistant", "content": defused(content)} if content else None


def _no_text(place: str) -> str:
    raise bad_request(f"{place}.content: an assistant's message holds text", f"{place}.content", "invalid_value")


def _check_part(part: Any, place: str, settings: Settings) -> int:
    """Refuses what the chat room would read but a stranger must not ask for; returns the number of media."""
    if not isinstance(part, Mapping):
        raise bad_request(f"{place} is not an object", place, "invalid_value")
    kind = part.get("type")
    if kind not in PART_TYPES:
        raise bad_request(f"{place} has the type {str(kind)[:80]!r} (allowed: {', '.join(PART_TYPES)})", place)
    if kind == "text":
        return 0
    value = part.get(str(kind))
    address = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(value, Mapping) and value.get("detail") not in (None, *DETAILS):
        raise bad_request(
            f"{place} has the detail {str(value['detail'])[:80]!r} (allowed: {', '.join(DETAILS)})",
            f"{place}.{kind}.detail",
            "invalid_value",
        )
    if kind == "input_audio" or not isinstance(address, str):
        return 1
    scheme = scheme_of(address)
    if scheme in ("http", "https") and not settings.media_hosts:
        raise _not_fetched(place, "this server fetches nothing", "--allow-media-host")
    if scheme in ("", "file") and settings.media_folder is None:
        raise _not_fetched(place, "this server reads no files", "--allow-media-folder")
    if scheme not in ("data", "http", "https", "", "file"):
        raise bad_request(f"{place}: {scheme[:20]} addresses are not read (allowed: data)", place, "invalid_media")
    return 1


def _not_fetched(place: str, why: str, option: str) -> ApiError:
    return bad_request(f"{place}: {why} (send a data URL, or start it with {option})", place, "media_not_allowed")
