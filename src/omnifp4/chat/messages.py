"""Messages as people write them become the one form that the chat template and the talker understand.

That form is nested: ``{"role": "user", "content": [{"type": "text", "text": "Hello"}]}``. Where it is missing, the
model does not say so: a plain prompt has no role markers, and the talker then crashes far away, in a concatenation of
nothing. So every way in leads through `normalise`, and text that already carries markers is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omnifp4.chat.errors import ChatError

Message = dict[str, Any]
Part = dict[str, Any]

ROLES = ("system", "user", "assistant")
ROLE_ALIASES = {"developer": "system"}
"""OpenAI's newer name for the same thing."""

MEDIA = ("image", "audio", "video")

_EXTRA_KEYS: dict[str, frozenset[str]] = {
    "text": frozenset(),
    "image": frozenset(),
    "audio": frozenset({"sampling_rate"}),
    "video": frozenset({"sound"}),
    "image_url": frozenset(),
    "audio_url": frozenset(),
    "video_url": frozenset(),
    "input_audio": frozenset(),
}
"""Part types, and what a part may have beside ``type`` and the key of its own name."""

PART_TYPES = tuple(_EXTRA_KEYS)
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "aiff", "webm")
"""Names that ``input_audio.format`` may have; the bytes decide how it is read."""


def normalise(messages: Any, *, markers: Collection[str] = ()) -> list[Message]:
    """Brings a conversation to the nested typed form.

    Args:
        messages: a plain string; one message; a list of messages; or a list of parts, which make one user message.
            Content is a string, a part, or a list of strings and parts: typed (``{"type": "audio", "audio": source}``),
            untyped (``{"audio": source}``), or OpenAI's ``image_url``, ``audio_url``, ``video_url``, ``input_audio``.
        markers: the tokenizer's special tokens; text that contains one is refused.

    Returns:
        Messages whose content is a list of ``text``, ``image``, ``audio`` and ``video`` parts; media are not read yet.
        Normalising them again changes nothing.

    Raises:
        ChatError: naming message, part and key, and what is allowed there.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    elif isinstance(messages, Mapping):
        messages = [messages] if "role" in messages else [{"role": "user", "content": [messages]}]
    elif not _is_list(messages):
        raise ChatError(
            f"a conversation is a string, a message or a list of messages, not {_name(messages)}",
            hint='for example [{"role": "user", "content": "Hello"}]',
        )
    elif messages and not any(isinstance(item, Mapping) and "role" in item for item in messages):
        messages = [{"role": "user", "content": messages}]
    if not messages:
        raise ChatError("the conversation is empty", hint="it needs at least one user message")
    result = [_message(item, number, markers) for number, item in enumerate(messages)]
    if all(message["role"] != "user" for message in result):
        raise ChatError("the conversation has no user message", hint="the model answers a user; add one")
    return result


def check_last(messages: Sequence[Message]) -> None:
    """Refuses a conversation that does not end with the user's turn, which is what the model would answer."""
    if messages[-1]["role"] != "user":
        raise ChatError(
            f"message {len(messages) - 1} is the last and comes from the {messages[-1]['role']}",
            hint="the last message must come from the user",
        )


def user_message(
    text: Any, *, images: Any = (), audios: Any = (), videos: Any = (), markers: Collection[str] = ()
) -> Message:
    """One user message: media first, in the order image, video, audio, then the text.

    Args:
        text: a string, a list of parts, or None where media say it all.
        images: one source or a list of them.
        audios: one source (also ``(samples, sampling_rate)``) or a list of them.
        videos: one source or a list of them.
        markers: as in `normalise`.
    """
    parts: list[Any] = [{"type": "image", "image": source} for source in listed(images)]
    parts += [{"type": "video", "video": source} for source in listed(videos)]
    parts += [{"type": "audio", "audio": source} for source in listed(audios)]
    if isinstance(text, str):
        parts += [text] if text else []
    elif isinstance(text, Mapping):
        parts.append(text)
    elif _is_list(text):
        parts += list(text)
    elif text is not None:
        raise ChatError(f"the text must be a string or a list of parts, not {_name(text)}")
    if any(isinstance(part, Mapping) and "role" in part for part in parts):
        raise ChatError("this is one turn, so it takes text or parts, not messages", hint="use complete(messages)")
    return normalise([{"role": "user", "content": parts}], markers=markers)[0]


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may spell half of a surrogate pair, which is no character."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def listed(value: Any) -> list[Any]:
    """One source, or several, as a list."""
    if value is None:
        return []
    if isinstance(value, tuple) and len(value) == 2 and any(isinstance(item, int) for item in value):
        return [value]  # samples and their rate
    return list(value) if isinstance(value, list | tuple) else [value]


def turns(messages: Sequence[Message]) -> list[list[int]]:
    """Groups message numbers into turns: a user's messages and the answer to them. System messages are in none."""
    groups: list[list[int]] = []
    before = "system"
    for number, message in enumerate(messages):
        if message["role"] == "system":
            continue
        if not groups or (message["role"] == "user" and before != "user"):
            groups.append([])
        groups[-1].append(number)
        before = message["role"]
    return groups


def _message(item: Any, number: int, markers: Collection[str]) -> Message:
    if not isinstance(item, Mapping):
        raise ChatError(f"message {number} is {_name(item)}", hint="a message is {'role': …, 'content': …}")
    unknown = sorted(str(key) for key in item if key not in ("role", "content"))
    if unknown:
        raise ChatError(f"message {number} has the unknown key {unknown[0]!r}", hint="allowed: role, content")
    role = item.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ChatError(f"message {number} has the role {role!r}", hint=f"allowed: {', '.join(ROLES)}")
    where = f"message {number} ({role})"
    if role == "system" and number:
        raise ChatError(f"{where} is not the first", hint="a conversation has one system message, at its start")
    if "content" not in item:
        raise ChatError(f"{where} has no content", hint="a string or a list of parts")
    content = item["content"]
    if isinstance(content, str | Mapping):
        content = [content]
    if not _is_list(content):
        raise ChatError(f"{where} has {_name(content)} as content", hint="a string or a list of parts")
    parts = [_part(part, f"{where}, part {place}", role, markers) for place, part in enumerate(content)]
    if not any(part["type"] != "text" or part["text"] for part in parts):
        raise ChatError(f"{where} is empty", hint="it needs text, an image, an audio or a video")
    return {"role": role, "content": parts}


def _part(part: Any, where: str, role: str, markers: Collection[str]) -> Part:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ChatError(f"{where} is {_name(part)}", hint="a part is a string or {'type': …, …}")
    kind = part.get("type")
    if "type" not in part:
        named = [name for name in PART_TYPES if name in part]
        if len(named) != 1:
            raise ChatError(f"{where} has no type", hint=f"allowed: {', '.join(PART_TYPES)}")
        kind = named[0]
    if not isinstance(kind, str) or kind not in _EXTRA_KEYS:
        raise ChatError(f"{where} has the type {kind!r}", hint=f"allowed: {', '.join(PART_TYPES)}")
    allowed = ["type", kind, *sorted(_EXTRA_KEYS[kind])]
    unknown = sorted(str(key) for key in part if key not in allowed)
    if unknown:
        raise ChatError(f"{where} ({kind}) has the unknown key {unknown[0]!r}", hint=f"allowed: {', '.join(allowed)}")
    if part.get(kind) is None:
        raise ChatError(f"{where} ({kind}) has no {kind!r}", hint=f"write {{'type': {kind!r}, {kind!r}: …}}")
    result = {**_content(part[kind], kind, where), **{key: part[key] for key in _EXTRA_KEYS[kind] if key in part}}
    if result["type"] == "text":
        _refuse_markers(result["text"], where, markers)
    elif role != "user":
        raise ChatError(f"{where} is {result['type']}", hint=f"a {role} message holds text only")
    return result


def _content(value: Any, kind: str, where: str) -> Part:
    if kind == "text":
        if not isinstance(value, str):
            raise ChatError(f"{where} has {_name(value)} as text", hint="text is a string")
        if not is_unicode(value):
            raise ChatError(f"{where} holds half of a surrogate pair, which is no character", hint="send UTF-8")
        return {"type": "text", "text": value}
    if kind == "input_audio":
        fields = _fields(value, ("data", "format"), where, kind)
        data, form = fields.get("data"), fields.get("format", "wav")
        if not isinstance(data, str):
            raise ChatError(f"{where} (input_audio) has {_name(data)} as data", hint="data is base64 text")
        if form not in AUDIO_FORMATS:
            raise ChatError(
                f"{where} (input_audio) has the format {form!r}", hint=f"allowed: {', '.join(AUDIO_FORMATS)}"
            )
        return {"type": "audio", "audio": f"data:audio/{form};base64,{data}"}
    if kind.endswith("_url"):
        medium = kind.removesuffix("_url")
        if isinstance(value, Mapping):
            value = _fields(value, ("url", "detail"), where, kind).get("url")
        if not isinstance(value, str):
            raise ChatError(f"{where} ({kind}) has {_name(value)} as url", hint="a url is a string")
        return {"type": medium, medium: value}
    if isinstance(value, bool | int | float | Mapping):
        raise ChatError(f"{where} has {_name(value)} as {kind}", hint="allowed: a path, a data URL, bytes, an array")
    return {"type": kind, kind: value}


def _fields(value: Any, allowed: tuple[str, ...], where: str, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where} has {_name(value)} as {kind}", hint=f"an object with {', '.join(allowed)}")
    unknown = sorted(str(key) for key in value if key not in allowed)
    if unknown:
        raise ChatError(f"{where} ({kind}) has the unknown key {unknown[0]!r}", hint=f"allowed: {', '.join(allowed)}")
    return value


def _refuse_markers(text: str, where: str, markers: Collection[str]) -> None:
    if "<" not in text:
        return
    found = [marker for marker in markers if marker in text]
    if found:
        first = min(found, key=text.index)
        raise ChatError(
            f"{where} contains the marker {first!r}, which only the chat template may write",
            hint="pass roles and media as messages and parts, not as a prompt written by hand",
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _name(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
