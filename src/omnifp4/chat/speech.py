"""Speech: the talker's codes to a waveform while they are made.

Transformers' own ``generate()`` assembles the talker's input; `omnifp4.decoding.speech_engine` runs the talker, on a GPU
as one CUDA graph a frame. It runs in a thread, so that chunks can be heard while the next are made, and so that Ctrl-C
ends it between two frames and never within one; another thread decodes.

code2wav is causal: the waveform of the first n frames is a beginning of the waveform of all. Decoding again with enough
frames before the new ones therefore gives the same samples as decoding everything at once, to the rounding of kernels
that see other lengths. The model's ``chunked_decode`` differs from that at each of its seams (300 frames): it leaves
out what its transposed convolutions cut off, 23 ms; here nothing is missing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnifp4.chat.answer import SAMPLING_RATE, Waveform
from omnifp4.chat.errors import ChatError
from omnifp4.chat.generated import read_generated
from omnifp4.chat.generation import Options
from omnifp4.chat.inputs import ModelInputs
from omnifp4.decoding.model_lock import model_lock

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
        from omnifp4.decoding.speech_choice import choose_speech

        way, _ = choose_speech(model, options.speech_engine)
        frames = FrameDecoder(model, pieces, chunks)
        with model_lock(model):
            if way == "stock":
                _run_stock(model, script, options, frames, stop)
            else:
                _run_engine(model, script, options, frames, stop, way)
    except BaseException as error:
        pieces.put(error)
    finally:
        pieces.put(None)


def _run_engine(
    model: Any, script: Script, options: Options, frames: FrameDecoder, stop: threading.Event, way: str
) -> None:
    """Codes from our own loop."""
    from omnifp4.decoding.speech_engine import engine_for
    from omnifp4.decoding.speech_sampling import CodeSampling
    from omnifp4.decoding.talker_opening import assemble

    opening = assemble(
        model,
        script.inputs.tensors,
        _written(model, script),
        eos=script.eos,
        speaker=script.speaker,
        sound_in_video=script.inputs.sound_in_video,
    )
    sampling = CodeSampling(
        greedy=not options.speech_temperature,
        temperature=float(options.speech_temperature) or 1.0,
        top_k=opening.top_k,
        top_p=opening.top_p,
        repetition_penalty=opening.repetition_penalty,
    )
    most_frames = max(1, frames.number_of(options.max_speech_seconds))
    made = engine_for(model.talker, way).frames(opening, sampling, seed=options.seed, most_frames=most_frames)
    with closing(made):
        decode_beside(made, frames, stop)


def decode_beside(made: Iterator[Any], frames: FrameDecoder, stop: threading.Event) -> None:
    """Decodes frames while more are made: on a GPU in another thread, so that neither waits for the other.

    Args:
        made: codes of frame after frame, ``[groups]``.
        frames: gets them.
        stop: set by who listens no longer.
    """
    if not frames.on_gpu:
        # Both would use all cores, each in the way of the other.
        for frame in made:
            if stop.is_set():
                return
            frames.add(frame[None])
        frames.flush()
        return
    codes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, thread_name_prefix="omnifp4-speech") as pool:
        decoded = pool.submit(_decode, frames, codes, stop)
        try:
            for frame in made:
                if stop.is_set() or decoded.done():
                    break
                codes.put(frame)
        finally:
            codes.put(None)
        decoded.result()


def _decode(frames: FrameDecoder, codes: queue.SimpleQueue[Any], stop: threading.Event) -> None:
    with frames.beside_the_talker():
        while (frame := codes.get()) is not None and not stop.is_set():
            frames.add(frame[None])
        if not stop.is_set():
            frames.flush()


def _run_stock(model: Any, script: Script, options: Options, frames: FrameDecoder, stop: threading.Event) -> None:
    """Transformers' own ``generate()``: the reference. Its first part is replaced by the text that is there already,
    and its last by a decoder that has decoded all along."""
    import torch
    from transformers import StoppingCriteriaList

    from omnifp4.decoding.talker_opening import borrowed

    device = model.talker.device
    cuda = [device] if device.type == "cuda" else []

    def stopping(ids: Any, *_: Any, **__: Any) -> Any:
        return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)

    sound = {"use_audio_in_video": True, "talker_use_audio_in_video": True} if script.inputs.sound_in_video else {}
    sampling: dict[str, Any] = {"talker_do_sample": False}
    if options.speech_temperature:
        sampling = {"talker_do_sample": True, "talker_temperature": float(options.speech_temperature)}
    written = _written(model, script)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if cuda:
            stack.enter_context(torch.cuda.device(device))
        torch.manual_seed(options.seed)
        stack.enter_context(borrowed(model.thinker, "generate", lambda **_: written))
        stack.enter_context(borrowed(model.code2wav, "chunked_decode", frames.finish))
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
    from omnifp4.decoding.talker_opening import written_text

    return written_text(model, script.inputs.tensors["input_ids"], script.states, script.tokens, script.eos)


class FrameDecoder:
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
            self._decode(len(self._codes))
            self._next = len(self._codes) + self._step

    def flush(self) -> None:
        """Decodes what is left."""
        while self._done < self.seen:
            self._decode(min(self.seen, self._done + WHOLE_FRAMES))

    def finish(self, codes: Any, **_: Any) -> Any:
        """Stands in for ``chunked_decode``: all codes, ``(1, groups, frames)``, were given to `add` before."""
        self.finished = True
        self.flush()
        return codes.new_zeros((1, 1, 0), dtype=self._code2wav.dtype)

    @property
    def on_gpu(self) -> bool:
        """Its kernels run by themselves once they are launched."""
        return bool(self._code2wav.device.type == "cuda")

    @contextmanager
    def beside_the_talker(self) -> Iterator[None]:
        """Decodes on a stream of its own, so that the talker's next frames need not wait for a chunk."""
        import torch

        device = self._code2wav.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    def _decode(self, now: int) -> None:
        import torch

        first = max(0, self._done - self._context)
        codes = torch.stack(self._codes[first:now], dim=-1)
        with torch.no_grad():
            window = self._code2wav(codes.to(self._code2wav.device))
        new = window[0, 0, self._emitted - first * self._samples_per_frame :]
        self._done = now
        self._emitted += new.shape[-1]
        if new.shape[-1]:
            self._pieces.put(np.ascontiguousarray(new.float().cpu().numpy()))
