"""Bodies of requests: bytes to checked objects. What is unknown or unsupported is refused, never passed over."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnifp4.serve.errors import ApiError, bad_request

AUDIO_FORMATS: Final = ("wav", "pcm16", "mp3", "flac", "opus")
STREAMED_FORMATS: Final = ("pcm16", "wav")
"""Those that can be written before their end is known."""

MOST_STOPS: Final = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(_Strict):
    """What a stream has beside its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False


class VoiceId(_Strict):
    """OpenAI's other way to name a voice."""

    id: str


class AudioWish(_Strict):
    """How an answer is spoken."""

    voice: str | VoiceId = "default"
    format: Literal["wav", "pcm16", "mp3", "flac", "opus"] = "wav"


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_Strict):
    """``POST /v1/chat/completions``. Fields are OpenAI's; `top_k`, `repetition_penalty` and `ignore_eos` are vLLM's."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioWish | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def speaks(self) -> bool:
        """Whether the answer is to be heard."""
        return "audio" in (self.modalities or ())

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class SpeechRequest(_Strict):
    """``POST /v1/audio/speech``."""

    model: str | None = None
    input: str = Field(min_length=1)
    voice: str | VoiceId = "default"
    instructions: str | None = None
    response_format: Literal["wav", "pcm", "pcm16", "mp3", "flac", "opus"] = "mp3"
    stream_format: Literal["audio"] = "audio"
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def form(self) -> str:
        """As `AUDIO_FORMATS` names it."""
        return "pcm16" if self.response_format == "pcm" else self.response_format


_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "prediction": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "speed": (1,),
    "echo": (False,),
    "best_of": (1,),
}
"""Fields of OpenAI's and Open WebUI's that this server knows only at values that change nothing."""

_PASSED_OVER: Final = ("safety_identifier", "prompt_cache_key", "verbosity", "reasoning_effort")
"""Fields of OpenAI's that ask for nothing which the answer would show."""

Body = TypeVar("Body", bound=_Strict)


def parse(data: bytes, kind: type[Body], depth: int) -> Body:
    """Reads a request's body.

    Args:
        data: JSON in UTF-8.
        kind: of request.
        depth: the most lists and objects within each other.

    Raises:
        ApiError: 400, naming the field and what is allowed.
    """
    value = read_json(data, depth)
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object")
    fields = {}
    for name, given in value.items():
        if name in _PASSED_OVER and name not in kind.model_fields:
            continue
        if name in _NEUTRAL and name not in kind.model_fields:
            neutral = _NEUTRAL[name]
            if given is not None and not any(_same(given, one) for one in neutral):
                allowed = ", ".join(json.dumps(one) for one in neutral)
                raise bad_request(
                    f"{name} is not supported" + (f" (allowed: {allowed})" if allowed else ""),
                    name,
                    "unsupported_value",
                )
            continue
        fields[name] = given
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _told(error, kind, fields) from None


def read_json(data: bytes, depth: int) -> Any:
    """A JSON document within bounds.

    Raises:
        ApiError: it is not JSON, not UTF-8, nested too deep, or holds NaN or Infinity.
    """
    _check_structure(data, depth)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=constant)
        if b"\\u" in data:
            # Half of a surrogate pair is JSON, but no text.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeError:
        raise bad_request("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from None


def _same(given: Any, one: Any) -> bool:
    return bool(given == one) and isinstance(given, bool) == isinstance(one, bool)


_STRUCTURE: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[{\]},:]', re.DOTALL)
MOST_ITEMS: Final = 200_000
"""Strings, brackets and commas of a body: small things that a parser makes large."""


def _check_structure(data: bytes, most: int) -> None:
    """Counts what is outside strings before a parser sees it."""
    depth = 0
    for count, match in enumerate(_STRUCTURE.finditer(data)):
        if count > MOST_ITEMS:
            raise bad_request(f"the body has more than {MOST_ITEMS:,} items")
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            if depth > most:
                raise bad_request(f"the body is nested deeper than {most} levels")
        elif first in b"]}":
            depth -= 1


def _told(error: ValidationError, kind: type[BaseModel], fields: dict[str, Any]) -> ApiError:
    """The first fault, in one line."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    places = [_place(fault["loc"], fields, absent=fault["type"] == "missing") for fault in faults]
    # Where a field may be one of several things, each of them has a fault: those are told that lie deepest.
    deepest = max((place for place in places if place[:1] == places[0][:1]), key=len)
    chosen = [fault for fault, place in zip(faults, places, strict=True) if place == deepest]
    what = chosen[0]["type"]
    place = ".".join(str(step)[:80] for step in deepest)
    if what == "extra_forbidden":
        allowed = f" (allowed: {', '.join(kind.model_fields)})" if len(deepest) == 1 else ""
        return bad_request(f"there is no field {place!r}{allowed}", place, "unknown_parameter")
    if what == "missing":
        return bad_request(f"{place} is missing", place, "missing_required_parameter")
    said = " or: ".join(dict.fromkeys(fault["msg"] for fault in chosen))
    return bad_request(f"{place}: {said}", place, "invalid_value")


def _place(steps: tuple[int | str, ...], fields: dict[str, Any], *, absent: bool) -> tuple[int | str, ...]:
    """Where in the body a fault lies: without the names of types, which pydantic puts among the steps.

    Args:
        steps: pydantic's ``loc``.
        fields: that were checked.
        absent: the last step is a field that is missing.
    """
    value: Any = fields
    place: list[int | str] = []
    for number, step in enumerate(steps):
        is_name = isinstance(value, dict) and (step in value or (absent and number == len(steps) - 1))
        if is_name:
            place, value = [*place, step], value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            place, value = [*place, step], value[step]
    return tuple(place)
