"""How fast speech is made: talker, code predictor and code2wav for one stream, in the pieces in which it is heard."""

from __future__ import annotations

import statistics
from typing import Any, Final

import torch

from omnifp4.benchmark.clock import now, spread
from omnifp4.benchmark.prompts import inputs_of, plain_vocabulary
from omnifp4.benchmark.settings import Settings
from omnifp4.chat.answer import SAMPLING_RATE
from omnifp4.chat.generation import Options
from omnifp4.chat.speech import Script, choose_speaker, speak
from omnifp4.decoding import Engine, Sampling
from omnifp4.decoding.speech_choice import choose_speech
from omnifp4.receipt.bench import SpeechRow

PROMPT_TOKENS: Final = 32
TEXT_TOKENS: Final = 128
LEAST_SECONDS: Final = 1.0
"""Of sound in a repeat, however slow it is; also what warms up."""


def time_speech(model: Any, engine: Engine, settings: Settings, device: torch.device) -> SpeechRow:
    """Real-time factor of one stream, the likeliest code taken each time.

    The text is random tokens after a prompt of random tokens. A talker that ends early is measured by what it said.
    """
    way, reason = choose_speech(model)
    how = f"{way}: {reason}"
    script = _script(model, engine, settings.seed, device)
    _speak(model, script, LEAST_SECONDS, device)
    seconds, _, sound = _speak(model, script, LEAST_SECONDS, device)
    if not sound:
        return SpeechRow(
            audio_seconds=0, real_time_factor=None, first_sound_seconds=None, how=how, not_measured="the talker says nothing"
        )  # fmt: skip
    affordable = settings.cell_seconds / settings.repeats / (seconds / sound)
    wanted = max(LEAST_SECONDS, min(settings.speech_seconds, affordable))
    if wanted > LEAST_SECONDS:
        # What is made for a length, caches and graphs, is made once.
        _speak(model, script, wanted, device)
    runs = [_speak(model, script, wanted, device) for _ in range(settings.repeats)]
    return SpeechRow(
        audio_seconds=statistics.median(sound for _, _, sound in runs),
        real_time_factor=spread(seconds / sound for seconds, _, sound in runs),
        first_sound_seconds=spread(first for _, first, _ in runs),
        how=how,
    )


def _script(model: Any, engine: Engine, seed: int, device: torch.device) -> Script:
    config, random = model.config, torch.Generator().manual_seed(seed)
    words = torch.randint(0, plain_vocabulary(config), (PROMPT_TOKENS + TEXT_TOKENS,), generator=random).tolist()
    asked = [config.im_start_token_id, config.user_token_id, *words[:PROMPT_TOKENS], config.im_end_token_id]
    ids = [*asked, config.im_start_token_id, config.assistant_token_id, words[0]]
    inputs = inputs_of(torch.tensor([ids], device=device))
    sequence = engine.start(inputs, Sampling(), most_tokens=1, keep_states=True)
    engine.stop(sequence)
    return Script(
        inputs, sequence.states, tuple(words[PROMPT_TOKENS:]), config.im_end_token_id, choose_speaker(model, True)
    )


def _speak(model: Any, script: Script, seconds: float, device: torch.device) -> tuple[float, float, float]:
    """Seconds of work, seconds to the first samples, and seconds of sound."""
    samples, first = 0, 0.0
    begin = now(device)
    options = Options(speech_temperature=0.0, max_speech_seconds=seconds)
    for piece in speak(model, script, options, chunks=True):
        first = first or now(device) - begin
        samples += piece.shape[-1]
    return now(device) - begin, first, samples / SAMPLING_RATE
