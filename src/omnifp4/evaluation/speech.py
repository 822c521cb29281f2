"""Speech out: what the talker says on both sides, text and speaker given.

Free-running, each side hears its own codes: one that differs changes all that follow. So beside it, both sides are also
asked for the next code where all before it are the reference's: what is then left is the damage of one step, and whether
it grows along a long utterance shows in quarters. The first code of a frame is the talker's, the later ones are the code
predictor's, so they are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

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

FRAMES_AT_ONCE: Final = 256
"""Through the code predictor, whose frames are sequences of their own."""

LATER: Final = "later_"
"""In a store, before the names of what is of later codes."""

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
    """What the reference says of one sample, and the distributions of its next codes, all before them given.

    Attributes:
        codes: of the first code of each frame, and of what follows the last.
        later: of the other codes, frame by frame; None if nothing was said.
    """

    utterance: Utterance
    codes: Distributions
    later: Distributions | None = None


@dataclass(frozen=True)
class SpokenSide:
    """What another side says of the same, and its next codes against the reference's, the reference's before them given."""

    utterance: Utterance
    codes: Scores
    later: Scores | None = None


class NextCodes(NamedTuple):
    """Logits of the next codes, all before them given, and what followed.

    Attributes:
        first: of each frame's first code and of what follows the last, float32 ``[frames + 1, vocabulary]``.
        followed: int64 ``[frames + 1]``.
        later: of the frames' other codes, float32 ``[frames * (groups - 1), vocabulary of the code predictor]``; None if
            there are none.
        later_followed: int64 ``[frames * (groups - 1)]``.
    """

    first: Tensor
    followed: Tensor
    later: Tensor | None = None
    later_followed: Tensor | None = None


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

    def next_codes(self, opening: Opening, codes: npt.NDArray[np.int64]) -> NextCodes:
        """The next codes of a speech whose codes ``[frames, groups]`` are given."""
        talker = self._model.talker
        assert codes.shape[1] == self.groups, "both sides have the same codec"
        table, others = talker.get_input_embeddings(), talker.code_predictor.get_input_embeddings()
        with self._attending(), torch.no_grad():
            first, state, cache, shift = read_prompt(talker, opening.inputs)
            given = torch.from_numpy(codes).to(first.device)
            followed = torch.cat([given[:, 0], given.new_tensor([opening.eos])])
            if not len(codes):
                return NextCodes(first, followed)
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
            behind = talker.codec_head(output.last_hidden_state)[0].float()
            states = torch.cat([state[0], output.last_hidden_state[0, :-1]])
            later = [
                self._later(states[here], [part[here] for part in parts])
                for here in (slice(begin, begin + FRAMES_AT_ONCE) for begin in range(0, frames, FRAMES_AT_ONCE))
            ]
        return NextCodes(torch.cat([first, behind]), followed, torch.cat(later), given[:, 1:].flatten())

    def _later(self, states: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Logits of the code predictor: the talker's states ``[n, H]`` and each group's embeddings before the next code."""
        predictor = self._model.talker.code_predictor
        given = torch.stack([states, *parts[:-1]], dim=1)
        found = predictor.model(inputs_embeds=given, use_cache=False).last_hidden_state
        heads = [predictor.lm_head[group - 1](found[:, group]).float() for group in range(1, len(parts))]
        return torch.stack(heads, dim=1).flatten(0, 1)

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
        kept = store.read(f"{sample.sha256}-spoken")
        found.append(_known(kept) if kept is not None else _spoken_first(sample, talker(ATTENTION), store))
        if floor:
            name = f"{sample.sha256}-spoken-floor"
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
        found.append(_spoken(sample, known, talker, store, f"{sample.sha256}-spoken"))
        tell(number + 1, len(samples), sample.sample.name)
    return found


def _spoken_first(sample: EncodedSample, side: Talker, store: Store) -> SpokenReference:
    """What the reference says, and kept; raises CheckpointError where it is no numbers."""
    opening, said = side.speak(sample)
    codes = side.next_codes(opening, said.codes)
    made, later = summarise(codes.first, codes.followed), None
    if codes.later is not None and codes.later_followed is not None:
        later = summarise(codes.later, codes.later_followed)
    if not made.finite.all() or (later is not None and not later.finite.all()):
        raise CheckpointError(f"the reference's speech of sample {sample.sample.name!r} is not finite")
    arrays = _utterance_arrays(said) | distribution_arrays(made)
    if later is not None:
        arrays |= {LATER + name: value for name, value in distribution_arrays(later).items()}
    store.write(f"{sample.sha256}-spoken", arrays)
    return SpokenReference(said, made, later)


def _known(kept: Arrays) -> SpokenReference:
    later = {name.removeprefix(LATER): value for name, value in kept.items() if name.startswith(LATER)}
    return SpokenReference(_utterance(kept), read_distributions(kept), read_distributions(later) if later else None)


def _spoken(
    sample: EncodedSample, known: SpokenReference, talker: Callable[[], Talker], store: Store, name: str
) -> SpokenSide:
    if (kept := store.read(name)) is not None:
        return SpokenSide(
            _utterance(kept), read_scores(kept), read_scores(kept, LATER) if f"{LATER}kl" in kept else None
        )
    side = talker()
    opening, said = side.speak(sample)
    codes = side.next_codes(opening, known.utterance.codes)
    scores, later = compare(known.codes, codes.first, codes.followed), None
    if known.later is not None and codes.later is not None and codes.later_followed is not None:
        later = compare(known.later, codes.later, codes.later_followed)
    behind = {LATER + key: value for key, value in vars(later).items()} if later is not None else {}
    store.write(name, _utterance_arrays(said) | vars(scores) | behind)
    return SpokenSide(said, scores, later)


def _utterance_arrays(said: Utterance) -> dict[str, Any]:
    return {"codes": said.codes, "finite_wave": np.array(said.finite), "heard": np.array(said.heard)}


def _utterance(arrays: Arrays) -> Utterance:
    return Utterance(arrays["codes"], bool(arrays["finite_wave"]), str(arrays["heard"]))
