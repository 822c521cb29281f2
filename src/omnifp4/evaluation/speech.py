"""Speech out: what the talker says on both sides, text and speaker given.

Free-running, each side hears its own codes: one that differs changes all that follow. So beside it, both sides are also
asked for the next code where all before it are the reference's: what is then left is the damage of one step, and whether
it grows along a long utterance shows in quarters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnifp4.chat.inputs import ModelInputs
from omnifp4.chat.speech import choose_speaker
from omnifp4.decoding.model_lock import model_lock
from omnifp4.decoding.module_engine import ThinkerDecoder
from omnifp4.decoding.speech_choice import choose_speech
from omnifp4.decoding.speech_engine import engine_for
from omnifp4.decoding.speech_sampling import CodeSampling
from omnifp4.decoding.speech_steps import read_prompt
from omnifp4.decoding.talker_opening import Opening, assemble, written_text
from omnifp4.errors import CheckpointError
from omnifp4.evaluation.distributions import Distributions, compare, summarise
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.statistics import ratio_estimate
from omnifp4.evaluation.store import Store
from omnifp4.receipt.evaluation import Recognition, SpeechResult

FRAMES_A_TOKEN: Final = 12
"""A second: more than a spoken digit takes, and so an end to a talker that finds none."""
QUARTERS: Final = 4

Listener = Callable[[npt.NDArray[np.float32]], str]
"""Waveform at 24 kHz to what a classifier of real recordings hears."""


@dataclass(frozen=True)
class Utterance:
    """One text as one side says it.

    Attributes:
        codes: int64 ``[frames, groups]``.
        finite: the waveform holds nothing but numbers.
        heard: what the listener heard; None without one.
    """

    codes: npt.NDArray[np.int64]
    finite: bool
    heard: str | None


def spoken_samples(samples: Sequence[EncodedSample]) -> list[EncodedSample]:
    """Those whose answer is to be spoken."""
    return [sample for sample in samples if sample.sample.speak and sample.sample.answer is not None]


class Talker:
    """One side's talker, for one sample after the other."""

    def __init__(self, model: Any, listen: Listener | None) -> None:
        """`model` was loaded with speech."""
        self._model, self._listen = model, listen
        self._speaker = choose_speaker(model, True)

    def opening(self, sample: EncodedSample) -> Opening:
        """The talker's input: this side's own hidden states of the prompt, and the known answer."""
        device = self._model.thinker.get_input_embeddings().weight.device
        count = sample.prompt_tokens
        tensors = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample.tensors.items()
        }
        answer = tuple(tensors["input_ids"][0, count:-1].tolist())
        for name in ("input_ids", "attention_mask"):
            tensors[name] = tensors[name][:, :count]
        decoder = ThinkerDecoder(self._model, keep_states=True)
        decoder.prefill(ModelInputs(tensors, sample.sound_in_video, ""))
        end = self._model.config.im_end_token_id
        with model_lock(self._model):
            written = written_text(self._model, tensors["input_ids"], decoder.states, answer, end)
            return assemble(
                self._model, tensors, written, eos=end, speaker=self._speaker, sound_in_video=sample.sound_in_video
            )

    def say(self, sample: EncodedSample, opening: Opening) -> Utterance:
        """The likeliest codes, and what they sound like."""
        sampling = CodeSampling(
            greedy=True, top_k=opening.top_k, top_p=opening.top_p, repetition_penalty=opening.repetition_penalty
        )
        way, _ = choose_speech(self._model)
        way = "modules" if way == "stock" else way
        most = FRAMES_A_TOKEN * (1 + len(sample.targets))
        with (
            model_lock(self._model),
            closing(engine_for(self._model.talker, way).frames(opening, sampling, seed=0, most_frames=most)) as frames,
        ):
            rows = [frame.cpu().numpy() for frame in frames]
        groups = int(self._model.talker.config.num_code_groups)
        codes = np.array(rows, dtype=np.int64).reshape(-1, groups)
        if not len(codes):
            return Utterance(codes, True, "" if self._listen is not None else None)
        with torch.no_grad():
            device = self._model.code2wav.device
            wave = self._model.code2wav(torch.from_numpy(codes.T.copy())[None].to(device))[0, 0].float().cpu()
        heard = self._listen(wave.numpy()) if self._listen is not None else None
        return Utterance(codes, bool(wave.isfinite().all()), heard)

    def next_codes(self, opening: Opening, codes: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Logits of the first code of each frame and of what follows the last, all before given; and what followed.

        Returns:
            ``[frames + 1, vocabulary]``, and int64 ``[frames + 1]``.
        """
        talker = self._model.talker
        table, others = talker.get_input_embeddings(), talker.code_predictor.get_input_embeddings()
        with torch.no_grad():
            first, _, cache, shift = read_prompt(talker, opening.inputs)
            given = torch.from_numpy(codes).to(first.device)
            parts = [table(given[:, 0])] + [others[group - 1](given[:, group]) for group in range(1, given.shape[1])]
            embedded = torch.stack(parts, dim=1).sum(1)[None]
            frames = len(codes)
            text = opening.pad.expand(1, frames, -1).clone()
            said = min(frames, opening.text.shape[1])
            text[:, :said] = opening.text[:, :said]
            places = shift + opening.prompt_tokens + torch.arange(frames, device=first.device)
            output = talker.model(
                inputs_embeds=embedded + text, position_ids=places.view(1, 1, -1).expand(3, 1, -1),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            later = talker.codec_head(output.last_hidden_state)[0].float()
        followed = torch.cat([given[:, 0], given.new_tensor([opening.eos])])
        return torch.cat([first, later]), followed


@dataclass(frozen=True)
class SpokenReference:
    """What the reference says of one sample, and the distributions of its next codes."""

    utterance: Utterance
    codes: Distributions


def speak_reference(
    samples: Sequence[EncodedSample], talker: Callable[[], Talker], store: Store, tell: Callable[[int, int, str], None]
) -> list[SpokenReference]:
    """The reference's utterances, from the cache where they are there.

    Raises:
        CheckpointError: the reference's codes are no numbers.
    """
    found = []
    for number, sample in enumerate(samples):
        kept = store.read(f"{sample.sha256}-speech")
        if kept is None:
            side = talker()
            opening = side.opening(sample)
            said = side.say(sample, opening)
            codes = (
                np.zeros((0, int(side._model.talker.config.num_code_groups)), np.int64)
                if not len(said.codes)
                else said.codes
            )
            logits, followed = side.next_codes(opening, codes)
            made = summarise(logits, followed)
            if not made.finite.all():
                raise CheckpointError(f"the reference's speech of sample {sample.sample.name!r} is not finite")
            kept = {
                "codes": codes, "finite_wave": np.array(said.finite), "heard": np.array(said.heard or ""),
                "log_probabilities": made.log_probabilities, "log_rest": made.log_rest, "likeliest": made.likeliest,
                "log_target": made.log_target, "finite": made.finite,
            }  # fmt: skip
            store.write(f"{sample.sha256}-speech", kept)
        made = Distributions(
            kept["log_probabilities"], None, kept["log_rest"], kept["likeliest"], kept["log_target"], kept["finite"]
        )
        found.append(SpokenReference(Utterance(kept["codes"], bool(kept["finite_wave"]), str(kept["heard"])), made))
        tell(number + 1, len(samples), sample.sample.name)
    return found


def compare_speech(
    samples: Sequence[EncodedSample],
    reference: Sequence[SpokenReference],
    talker: Talker,
    *,
    recognised: bool,
    seed: int,
    tell: Callable[[int, int, str], None],
) -> SpeechResult:
    """The model's speech against the reference's.

    Args:
        samples: that were spoken.
        reference: of each.
        talker: the model's.
        recognised: a listener heard both sides.
        seed: of the intervals.
        tell: called with samples done, samples in all, and the sample's name.
    """
    same, whole, agreed, steps, diverged = [np.zeros(len(samples)) for _ in range(5)]
    frames = bad = 0
    drift: tuple[float, ...] = ()
    longest = max(range(len(samples)), key=lambda number: len(reference[number].utterance.codes))
    heard: list[tuple[bool, bool]] = []
    for number, (sample, known) in enumerate(zip(samples, reference, strict=True)):
        opening = talker.opening(sample)
        said = talker.say(sample, opening)
        theirs = known.utterance.codes
        both = min(len(theirs), len(said.codes))
        same[number], whole[number] = float((theirs[:both] == said.codes[:both]).sum()), float(max(1, theirs.size))
        frames += len(said.codes)
        bad += not said.finite
        logits, followed = talker.next_codes(opening, theirs)
        scores = compare(known.codes, logits, followed)
        agreed[number], steps[number] = float((scores.agrees & scores.finite).sum()), float(len(scores.agrees))
        diverged[number] = float(np.nansum(scores.kl))
        if number == longest:
            drift = tuple(float(np.nanmean(part)) for part in np.array_split(scores.kl, QUARTERS) if len(part))
        if recognised and sample.sample.answer is not None and len(sample.sample.answer.strip()) == 1:
            digit = sample.sample.answer.strip()
            heard.append((known.utterance.heard == digit, said.heard == digit))
        tell(number + 1, len(samples), sample.sample.name)
    total = sum(len(one.utterance.codes) for one in reference)
    return SpeechResult(
        utterances=len(samples), frames=total,
        code_agreement=ratio_estimate(same, whole, seed=seed),
        first_code_agreement=ratio_estimate(agreed, steps, seed=seed),
        code_kl_mean=ratio_estimate(diverged, steps, seed=seed),
        drift=drift, frames_ratio=frames / max(1, total),
        recognition=_recognition(heard, seed) if heard else None, non_finite=bad,
    )  # fmt: skip


def _recognition(heard: Sequence[tuple[bool, bool]], seed: int) -> Recognition:
    before, after = (np.array([pair[side] for pair in heard], dtype=np.float64) for side in (0, 1))
    return Recognition(
        utterances=len(heard), reference=float(before.mean()), model=float(after.mean()),
        difference=ratio_estimate(after - before, np.ones_like(before), seed=seed),
    )  # fmt: skip
