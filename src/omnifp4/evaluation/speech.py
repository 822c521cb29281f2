"""Speech out: what the talker says on both sides, text and speaker given.

Free-running, each side hears its own codes: one that differs changes all that follow. So beside it, both sides are also
asked for the next code where all before it are the reference's: what is then left is the damage of one step, and whether
it grows along a long utterance shows in quarters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.evaluation.distributions import Distributions, Scores, compare, summarise
from omnifp4.evaluation.encoding import EncodedSample
from omnifp4.evaluation.listening import Listener
from omnifp4.evaluation.scoring import distribution_arrays, read_distributions, read_scores
from omnifp4.evaluation.sides import ATTENTION, OTHER_ATTENTION
from omnifp4.evaluation.store import Arrays, Store

FRAMES_A_TOKEN: Final = 12
"""A second: more than a spoken digit takes, and so an end to a talker that finds none."""

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Utterance:
    """One text as one side says it.

    Attributes:
        codes: int64 ``[frames, groups]``.
        finite: the waveform holds nothing but numbers.
        heard: what the listener heard; empty without one.
    """

    codes: npt.NDArray[np.int64]
    finite: bool
    heard: str


@dataclass(frozen=True)
class SpokenReference:
    """What the reference says of one sample, and the distributions of its next codes, all before them given."""

    utterance: Utterance
    codes: Distributions


@dataclass(frozen=True)
class SpokenSide:
    """What another side says of the same, and its next codes against the reference's, the reference's before them given."""

    utterance: Utterance
    codes: Scores


class Talker:
    """One side's talker, for one sample after the other."""

    def __init__(self, model: Any, location: str, listen: Listener | None, attention: str = ATTENTION) -> None:
        """Takes a talker.

        Args:
            model: loaded with speech.
            location: of its checkpoint.
            listen: hears the waveforms; None leaves them unheard.
            attention: implementation in thinker, talker and code predictor. Another than the usual one is for the noise
                floor, and takes Transformers' modules, whose attention can be chosen.
        """
        self._model, self._location, self._listen, self._attention = model, location, listen, attention
        self._speaker = choose_speaker(model, True)
        way, _ = choose_speech(model, "auto" if attention == ATTENTION else "modules")
        self._way = "modules" if way == "stock" else way

    @property
    def groups(self) -> int:
        """Codes of a frame."""
        return int(self._model.talker.config.num_code_groups)

    def speak(self, sample: EncodedSample) -> tuple[Opening, Utterance]:
        """The talker's input, and what it says of it.

        Raises:
            CheckpointError: it gives no numbers.
        """
        with self._attending():
            opening = self.opening(sample)
            try:
                return opening, self.say(sample, opening)
            except OmniFP4Error as error:
                raise CheckpointError(f"{self._location}, sample {sample.sample.name!r}: {error}") from error

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
        most = FRAMES_A_TOKEN * (1 + len(sample.targets))
        with (
            model_lock(self._model),
            closing(
                engine_for(self._model.talker, self._way).frames(opening, sampling, seed=0, most_frames=most)
            ) as frames,
        ):
            rows = [frame.cpu().numpy() for frame in frames]
        codes = np.array(rows, dtype=np.int64).reshape(-1, self.groups)
        if not len(codes):
            return Utterance(codes, True, "")
        with torch.no_grad():
            device = self._model.code2wav.device
            wave = self._model.code2wav(torch.from_numpy(codes.T.copy())[None].to(device))[0, 0].float().cpu()
        heard = self._listen(wave.numpy()) if self._listen is not None else ""
        return Utterance(codes, bool(wave.isfinite().all()), heard)

    def next_codes(self, opening: Opening, codes: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Logits of the first code of each frame and of what follows the last, all before given; and what followed.

        Returns:
            ``[frames + 1, vocabulary]``, and int64 ``[frames + 1]``.
        """
        talker = self._model.talker
        assert codes.shape[1] == self.groups, "both sides have the same codec"
        table, others = talker.get_input_embeddings(), talker.code_predictor.get_input_embeddings()
        with self._attending(), torch.no_grad():
            first, _, cache, shift = read_prompt(talker, opening.inputs)
            given = torch.from_numpy(codes).to(first.device)
            followed = torch.cat([given[:, 0], given.new_tensor([opening.eos])])
            if not len(codes):
                return first, followed
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
        return torch.cat([first, later]), followed

    @contextmanager
    def _attending(self) -> Iterator[None]:
        talker = self._model.talker
        configs = [self._model.thinker.get_decoder().config, talker.model.config, talker.code_predictor.model.config]
        before = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = self._attention
            yield
        finally:
            for config, own in zip(configs, before, strict=True):
                config._attn_implementation = own


def speak_reference(
    samples: Sequence[EncodedSample], talker: Callable[[str], Talker], store: Store, *, floor: bool, tell: Tell
) -> tuple[list[SpokenReference], list[SpokenSide]]:
    """The reference's utterances and its noise floor's, from the cache where they are there.

    Args:
        samples: whose answers are spoken.
        talker: the reference's, with an attention; not called if all is in the cache.
        store: of the reference.
        floor: speak a second time.
        tell: called with samples done, samples in all, and the sample's name.

    Raises:
        CheckpointError: the reference's codes are no numbers.
    """
    found, floors = [], []
    for number, sample in enumerate(samples):
        kept = store.read(f"{sample.sha256}-speech")
        if kept is None:
            side = talker(ATTENTION)
            opening, said = side.speak(sample)
            made = summarise(*side.next_codes(opening, said.codes))
            if not made.finite.all():
                raise CheckpointError(f"the reference's speech of sample {sample.sample.name!r} is not finite")
            store.write(f"{sample.sha256}-speech", _utterance_arrays(said) | distribution_arrays(made))
            found.append(SpokenReference(said, made))
        else:
            found.append(SpokenReference(_utterance(kept), read_distributions(kept)))
        if floor:
            name = f"{sample.sha256}-speech-floor"
            floors.append(_spoken(sample, found[-1], lambda: talker(OTHER_ATTENTION), store, name))
        tell(number + 1, len(samples), sample.sample.name)
    return found, floors


def speak_model(
    samples: Sequence[EncodedSample],
    reference: Sequence[SpokenReference],
    talker: Callable[[], Talker],
    store: Store,
    *,
    tell: Tell,
) -> list[SpokenSide]:
    """The model's utterances against the reference's; arguments as in `speak_reference`.

    Raises:
        CheckpointError: the model's codes are no numbers.
    """
    found = []
    for number, (sample, known) in enumerate(zip(samples, reference, strict=True)):
        found.append(_spoken(sample, known, talker, store, f"{sample.sha256}-speech"))
        tell(number + 1, len(samples), sample.sample.name)
    return found


def _spoken(
    sample: EncodedSample, known: SpokenReference, talker: Callable[[], Talker], store: Store, name: str
) -> SpokenSide:
    if (kept := store.read(name)) is not None:
        return SpokenSide(_utterance(kept), read_scores(kept))
    side = talker()
    opening, said = side.speak(sample)
    scores = compare(known.codes, *side.next_codes(opening, known.utterance.codes))
    store.write(name, _utterance_arrays(said) | vars(scores))
    return SpokenSide(said, scores)


def _utterance_arrays(said: Utterance) -> dict[str, Any]:
    return {"codes": said.codes, "finite_wave": np.array(said.finite), "heard": np.array(said.heard)}


def _utterance(arrays: Arrays) -> Utterance:
    return Utterance(arrays["codes"], bool(arrays["finite_wave"]), str(arrays["heard"]))
