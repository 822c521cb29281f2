"""Speech: the talker's codes to a waveform while they are made.

Transformers' own ``generate()`` assembles the talker's input and runs it; only its first part is replaced by the text
that is there already, and its last by a decoder that has decoded all along. It runs in a thread, so that chunks can be
heard while the next are made, and so that Ctrl-C ends it between two codes and never within one.

code2wav is causal: the waveform of the first n frames is a beginning of the waveform of all. Decoding again with enough
frames before the new ones therefore gives the same samples as decoding everything at once, to the rounding of kernels
that see other lengths. The model's ``chunked_decode`` differs from that at each of its seams (300 frames): it leaves
out what its transposed convolutions cut off, 23 ms; here nothing is missing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from omnifp4.chat.answer import SAMPLING_RATE, Waveform
from omnifp4.chat.errors import ChatError
from omnifp4.chat.generated import read_generated
from omnifp4.chat.generation import Options, model_lock
from omnifp4.chat.inputs import ModelInputs

FIRST_FRAMES = 12
"""About a second: the first chunk comes early."""
NEXT_FRAMES = 50
"""Four seconds."""
WHOLE_FRAMES = 300
"""Chunk when nobody listens: that of the model's own ``chunked_decode``."""
MOST_CONTEXT = 300
"""Frames decoded again before new ones; the stock decoder uses 25."""


@dataclass(frozen=True)
class Script:
    """What is to be said.

    Attributes:
        inputs: the conversation.
        states: hidden states of the prompt, ``(1, tokens, hidden)``.
        tokens: ids of the text, without end marker.
        eos: id of the end marker.
        speaker: a name of `speakers`.
    """

    inputs: ModelInputs
    states: Any
    tokens: tuple[int, ...]
    eos: int
    speaker: str


def speakers(model: Any) -> tuple[str, ...]:
    """Names that the checkpoint's talker knows, as people write them."""
    known = getattr(getattr(model.config, "talker_config", None), "speaker_id", None) or {}
    return tuple(name.capitalize() for name in known)


def choose_speaker(model: Any, wanted: bool | str) -> str:
    """The speaker's name as the talker knows it.

    Raises:
        ChatError: nobody of that name; the message lists who there is.
    """
    known = speakers(model)
    if wanted is True:
        wanted = "Ethan" if "Ethan" in known else next(iter(known), "")
    if not isinstance(wanted, str) or wanted.lower() not in [name.lower() for name in known]:
        raise ChatError(f"there is no speaker {wanted!r}", hint=f"speakers: {', '.join(known) or 'none'}")
    return wanted.lower()


def speak(model: Any, script: Script, options: Options, *, chunks: bool) -> Generator[Waveform, None, None]:
    """Says a text.

    Args:
        model: with a talker.
        script: what to say.
        options: seed, temperature and length of the speech.
        chunks: give pieces as early as possible; otherwise decode in as few as possible.

    Yields:
        Samples at 24 kHz, each piece following the last without a gap; nothing where the talker finds nothing to say.
    """
    if not script.tokens:
        return
    pieces: queue.SimpleQueue[Waveform | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    worker = threading.Thread(
        target=_work, args=(model, script, options, chunks, pieces, stop), name="omnifp4-speech", daemon=True
    )
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stop.set()
        worker.join()


def _work(model: Any, script: Script, options: Options, chunks: bool, pieces: Any, stop: threading.Event) -> None:
    try:
        _run_talker(model, script, options, _Frames(model, pieces, chunks), stop)
    except BaseException as error:
        pieces.put(error)
    finally:
        pieces.put(None)


def _run_talker(model: Any, script: Script, options: Options, frames: _Frames, stop: threading.Event) -> None:
    import torch
    from transformers import StoppingCriteriaList

    device = model.talker.device
    cuda = [device] if device.type == "cuda" else []

    def stopping(ids: Any, *_: Any, **__: Any) -> Any:
        return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)

    sound = {"use_audio_in_video": True, "talker_use_audio_in_video": True} if script.inputs.sound_in_video else {}
    sampling: dict[str, Any] = {"talker_do_sample": False}
    if options.speech_temperature:
        sampling = {"talker_do_sample": True, "talker_temperature": float(options.speech_temperature)}
    with ExitStack() as stack:
        stack.enter_context(model_lock(model))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if cuda:
            stack.enter_context(torch.cuda.device(device))
        torch.manual_seed(options.seed)
        stack.enter_context(_borrowed(model.thinker, "generate", _written(model, script)))
        stack.enter_context(_borrowed(model.code2wav, "chunked_decode", frames.finish))
        hook = model.talker.register_forward_hook(lambda _, __, output: frames.add(output.hidden_states[1]))
        stack.callback(hook.remove)
        try:
            output = model.generate(
                **script.inputs.tensors,
                **sound,
                **sampling,
                return_audio=True,
                speaker=script.speaker,
                thinker_eos_token_id=script.eos,
                talker_max_new_tokens=max(2, frames.number_of(options.max_speech_seconds) + 1),
                talker_stopping_criteria=StoppingCriteriaList([stopping]),
            )
        except (RuntimeError, IndexError):
            # The talker ended before its first code, by choice or because it was stopped: stock code then stacks
            # an empty list.
            if frames.seen or frames.finished:
                raise
            return
    # What came in pieces and what `generate` returned are the same samples; this asserts the form of the latter.
    read_generated(output, script.inputs.prompt_tokens)


def _written(model: Any, script: Script) -> Any:
    """Stands in for the thinker's ``generate``: the text is there already.

    Of the hidden states, the talker's input takes the embeddings of text (number 0) and, where media stand in the
    prompt, one layer's states. The end marker is always there, so that the last word is spoken also when the text was
    cut at its limit.
    """
    import torch

    prompt = script.inputs.tensors["input_ids"]
    said = prompt.new_tensor([script.tokens])
    with torch.no_grad():
        embeddings = model.thinker.get_input_embeddings()(torch.cat([prompt, said], dim=1))
    layers = {0: embeddings, model.config.talker_config.accept_hidden_layer: script.states}
    sequences = torch.cat([prompt, said, prompt.new_tensor([[script.eos]])], dim=1)
    result = SimpleNamespace(sequences=sequences, hidden_states=(layers,))

    def generate(**_: Any) -> Any:
        return result

    return generate


@contextmanager
def _borrowed(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Replaces a method of one module, not of its class."""
    own = module.__dict__.get(name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


class _Frames:
    """Collects codes and decodes them when enough are there."""

    def __init__(self, model: Any, pieces: Any, chunks: bool) -> None:
        self._code2wav = model.code2wav
        self._pieces = pieces
        self._codes: list[Any] = []
        self._step = NEXT_FRAMES if chunks else WHOLE_FRAMES
        self._next = FIRST_FRAMES if chunks else WHOLE_FRAMES
        self._samples_per_frame = int(model.code2wav.total_upsample)
        config = model.code2wav.config
        # Every layer looks back one window; the convolutions after them a few frames more.
        self._context = min(MOST_CONTEXT, (config.sliding_window - 1) * config.num_hidden_layers + 16)
        self._done = 0
        self._emitted = 0
        self.finished = False

    @property
    def seen(self) -> int:
        """Frames so far."""
        return len(self._codes)

    def number_of(self, seconds: float) -> int:
        """Frames in so many seconds."""
        return round(seconds * SAMPLING_RATE / self._samples_per_frame)

    def add(self, codes: Any) -> None:
        """Takes one frame's codes, shape ``(1, groups)``; None at the first step, which has none."""
        if codes is None:
            return
        self._codes.append(codes)
        if len(self._codes) >= self._next:
            import torch

            self._decode(torch.stack(self._codes, dim=-1))
            self._next = len(self._codes) + self._step

    def finish(self, codes: Any, **_: Any) -> Any:
        """Stands in for ``chunked_decode``: decodes what is left; shapes ``(1, groups, frames)``, ``(1, 1, samples)``."""
        self.finished = True
        frames = codes.shape[-1]
        while self._done < frames:
            self._decode(codes[..., : min(frames, self._done + WHOLE_FRAMES)])
        return codes.new_zeros((1, 1, 0), dtype=self._code2wav.dtype)

    def _decode(self, codes: Any) -> None:
        import torch

        now = codes.shape[-1]
        first = max(0, self._done - self._context)
        with torch.no_grad():
            window = self._code2wav(codes[..., first:now].to(self._code2wav.device))
        new = window[0, 0, self._emitted - first * self._samples_per_frame :]
        self._done = now
        self._emitted += new.shape[-1]
        if new.shape[-1]:
            self._pieces.put(np.ascontiguousarray(new.float().cpu().numpy()))
