"""Decoded messages to the tensors that the model reads, through the checkpoint's own template and processor.

This is the only way to a prompt: the template is always applied, and what came out is checked for the role markers
whose absence makes the talker crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from omnifp4.chat.errors import ChatError, ContextError
from omnifp4.chat.messages import Message, turns
from omnifp4.chat.video import FRAMES_PER_SECOND, Video

ContextRule = Literal["trim", "refuse"]


@dataclass(frozen=True)
class ModelInputs:
    """One conversation, ready for the model.

    Attributes:
        tensors: keyword arguments of the thinker; batch of one.
        sound_in_video: the audio features belong in part to videos.
        text: the prompt that the template wrote.
        turns_left_out: oldest turns that did not fit.
    """

    tensors: dict[str, Any]
    sound_in_video: bool
    text: str
    turns_left_out: int = 0

    @property
    def prompt_tokens(self) -> int:
        return int(self.tensors["input_ids"].shape[1])


def special_tokens(processor: Any) -> frozenset[str]:
    """Markers that only the template may write."""
    added = processor.tokenizer.added_tokens_decoder.values()
    return frozenset(str(token) for token in added if token.special)


def build_inputs(model: Any, processor: Any, messages: Sequence[Message], *, device: Any) -> ModelInputs:
    """Applies template and processor.

    Args:
        model: for its config's token ids.
        processor: the checkpoint's.
        messages: decoded, the user's turn last.
        device: of the model's inputs.

    Raises:
        ChatError: the template lost text or wrote no role markers.
    """
    import torch

    text = prompt_text(processor, messages)
    media = [part for message in messages for part in message["content"] if part["type"] != "text"]
    images = [part["image"] for part in media if part["type"] == "image"]
    videos = [part["video"] for part in media if part["type"] == "video"]
    # Positions are counted as if every video had sound or none had, so a silent one among others gets silence.
    sounding = any(video.sound is not None for video in videos)
    audios, owners = _audio_slots(media, sounding)
    if not media:
        # What the processor does with text alone, without its 3 ms of checking the arguments of all other media; and
        # without the tokenizer's own way to a tensor, which takes as long as the tokens do.
        ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
        return _checked(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, device, False, text)
    arguments: dict[str, Any] = {"text": text, "return_tensors": "pt"}
    if images:
        arguments["images"] = images
    if audios:
        arguments["audio"] = audios
    if videos:
        arguments["videos"] = [video.frames for video in videos]
        arguments["videos_kwargs"] = {"do_sample_frames": False, "fps": FRAMES_PER_SECOND}
        if hasattr(processor.video_processor, "cap_pixels_per_frame"):
            # Frames are within the cap already; naming it keeps the processor from warning.
            arguments["videos_kwargs"]["cap_pixels_per_frame"] = False
    if sounding and hasattr(processor, "load_audio_from_video"):
        arguments |= {"load_audio_from_video": True, "audio_from_video_indices": owners}
    elif sounding:
        # Its name before Transformers 5.23.
        arguments["use_audio_in_video"] = True
    return _checked(model, processor(**arguments), device, sounding, text)


def _checked(model: Any, batch: Any, device: Any, sounding: bool, text: str) -> ModelInputs:
    ids = batch["input_ids"][0].tolist()
    _check_roles(model.config, ids)
    tensors = {key: value.to(device) for key, value in batch.items() if hasattr(value, "to")}
    return ModelInputs(tensors, sounding, text)


def prompt_text(processor: Any, messages: Sequence[Message]) -> str:
    """The prompt as the checkpoint's template writes it, the assistant's header last."""
    plain = [
        {"role": message["role"], "content": [_rendered(part) for part in message["content"]]} for message in messages
    ]
    try:
        text = str(processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except TypeError:
        text = ""
    if plain[0]["role"] == "system" and not _has_text(text, messages[:1]):
        # Templates there are that know a system message as a string only.
        system = "".join(part["text"] for part in messages[0]["content"])
        plain[0] = {"role": "system", "content": system}
        text = str(processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    asked = [message for message in messages if message["role"] != "assistant"]
    if not _has_text(text, asked):
        raise ChatError(
            "the checkpoint's chat template drops text of the conversation", hint="compare its chat_template file"
        )
    return text


def fit_context(
    model: Any,
    processor: Any,
    messages: Sequence[Message],
    *,
    device: Any,
    limit: int,
    new_tokens: int,
    rule: ContextRule,
) -> ModelInputs:
    """As `build_inputs`, within the context.

    Args:
        model: as in `build_inputs`.
        processor: as in `build_inputs`.
        messages: as in `build_inputs`.
        device: as in `build_inputs`.
        limit: tokens of prompt and answer together.
        new_tokens: the most the answer may have.
        rule: ``trim`` leaves the oldest turns out, never the system message, never half a turn, never the last turn;
            ``refuse`` raises.

    Raises:
        ContextError: it does not fit; with ``trim``: not even the last turn alone.
    """
    inputs = build_inputs(model, processor, messages, device=device)
    over = inputs.prompt_tokens + new_tokens - limit
    if over <= 0:
        return inputs
    told = (
        f"the conversation has {inputs.prompt_tokens} tokens and the answer may have {new_tokens}, together more than"
    )
    hint = "lower max_new_tokens, shorten it, or reset"
    if rule == "refuse":
        raise ContextError(f"{told} the context of {limit}", hint=f"{hint}, or use context='trim'")
    ids = inputs.tensors["input_ids"][0].tolist()
    starts = [place for place, token in enumerate(ids) if token == model.config.im_start_token_id]
    if len(starts) != len(messages) + 1:
        raise ContextError(f"{told} the context of {limit}", hint=hint)
    lengths = [after - before for before, after in pairwise(starts)]
    groups = turns(messages)
    left_out = 0
    while over > 0 and left_out < len(groups) - 1:
        over -= sum(lengths[number] for number in groups[left_out])
        left_out += 1
    if over > 0:
        raise ContextError(f"{told} the context of {limit}, even without the turns before", hint=hint)
    gone = {number for group in groups[:left_out] for number in group}
    kept = [message for number, message in enumerate(messages) if number not in gone]
    shorter = build_inputs(model, processor, kept, device=device)
    return ModelInputs(shorter.tensors, shorter.sound_in_video, shorter.text, left_out)


def _rendered(part: dict[str, Any]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": part["type"], part["type"]: part["type"]}


def _audio_slots(media: Sequence[dict[str, Any]], sounding: bool) -> tuple[list[Any], list[int | None]]:
    """Audio in the order of the prompt, and for each the number of the video it belongs to."""
    audios: list[Any] = []
    owners: list[int | None] = []
    number = 0
    for part in media:
        if part["type"] == "audio":
            audios.append(part["audio"])
            owners.append(None)
        elif part["type"] == "video":
            video: Video = part["video"]
            if sounding:
                audios.append(video.silence if video.sound is None else video.sound)
                owners.append(number)
            number += 1
    return audios, owners


def _has_text(text: str, messages: Sequence[Message]) -> bool:
    parts = (part for message in messages for part in message["content"] if part["type"] == "text")
    return all(part["text"].strip() in text for part in parts)


def _check_roles(config: Any, ids: list[int]) -> None:
    pairs = list(pairwise(ids))
    start = config.im_start_token_id
    if (start, config.user_token_id) not in pairs or (start, config.assistant_token_id) not in pairs[-4:]:
        raise ChatError(
            "the checkpoint's chat template writes no <|im_start|>user and <|im_start|>assistant markers, "
            "without which the talker fails",
            hint="restore chat_template.jinja of the original model",
        )
