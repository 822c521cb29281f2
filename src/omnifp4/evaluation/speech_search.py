"""Which schemes a talker and its code predictor bear: each component is rounded alone, and its speech judged.

A component gets the smallest scheme under which its speech is no further from the wide model's than a stated multiple of
what another order of rounding in BF16 does, and no loss of spoken digits can be told from chance. What was chosen is then judged together, and
widened where the damage adds up.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.checkpoint.dtypes import byte_count
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import ModelError, OmniFP4Error
from omnifp4.evaluation.data import limited, read_data
from omnifp4.evaluation.devices import arithmetic_of_device, find_device, name_of_device
from omnifp4.evaluation.encoding import EncodedSample, data_digest, encode
from omnifp4.evaluation.listening import load_listener
from omnifp4.evaluation.pair import Pair, check_memory, open_pair
from omnifp4.evaluation.sides import ATTENTION
from omnifp4.evaluation.speech import SpokenReference, SpokenSide, Talker, speak_model, speak_reference
from omnifp4.evaluation.speech_results import is_digit, long_utterances, side_figures
from omnifp4.evaluation.speech_rounding import SPEAKING, Group, Rounder, groups_of
from omnifp4.evaluation.store import Store, checkpoint_key, content_key
from omnifp4.evaluation.threads import suited_threads
from omnifp4.formats.scheme import Scheme
from omnifp4.models.base import Kind, Part
from omnifp4.models.source import Source, match_source
from omnifp4.quantization.decisions import OutputFormat, stored_tensors
from omnifp4.quantization.method import Need
from omnifp4.quantization.recipe import MOST_NAME, RECIPES, Recipe, choose_schemes, find_recipe
from omnifp4.receipt.base import as_text, package_version, this_environment
from omnifp4.receipt.evaluation import SpeechFloor
from omnifp4.receipt.speech_search import SpeechSearchReceipt, SpeechTrial

TIMES_FLOOR: Final = 10.0
"""An order of magnitude above what the choice of an attention kernel does to BF16."""

FRAMES_OFF: Final = 0.1
"""Share by which the length of all speech may change; beyond it speech stops early or does not end."""

DTYPE: Final = torch.bfloat16
"""The noise floor is that of BF16; in float32 there is next to none to compare with."""

NEVER: Final = frozenset({Kind.ROUTER})
"""Components with linears that are no target: they pick the experts, and there is nothing to save."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class SpeechSearchSettings:
    """How to search.

    Attributes:
        data: ``"bundled"`` or a JSONL file; samples with ``speak`` are spoken.
        samples: use only so many of each task and modality; None uses all.
        base: recipe of what does not speak.
        schemes: to try, other than `Scheme.WIDE`; the smallest that passes is chosen.
        times_floor: see `TIMES_FLOOR`.
        name: of the recipe that is made.
        device: as in `omnifp4.evaluation.run.Settings`.
        cache: folder of what was worked out before, where a killed run goes on; None keeps nothing.
        seed: of the intervals.
    """

    data: str | Path = "bundled"
    samples: int | None = None
    base: str = "nvfp4"
    schemes: tuple[Scheme, ...] = (Scheme.NVFP4, Scheme.FP8)
    times_floor: float = TIMES_FLOOR
    name: str = "own-speech"
    device: str = "auto"
    cache: Path | None = None
    seed: int = 0


def search_speech(model: Path, settings: SpeechSearchSettings, progress: Progress | None = None) -> SpeechSearchReceipt:
    """Search the schemes of a wide checkpoint's talker and code predictor.

    Cost: the model in memory, and its speech ``4 + components x schemes`` times.

    Raises:
        OmniFP4Error: the checkpoint, the data or the settings are not right; before weights are read.
    """
    begin = time.monotonic()
    base = _checked(settings)
    device = find_device(settings.device)
    chosen = limited(tuple(one for one in read_data(settings.data) if one.speak), settings.samples)
    if not chosen:
        raise OmniFP4Error(
            f"{settings.data}: no sample is to be spoken", hint='give samples an answer and "speak": true'
        )
    pair = open_pair(model, model)
    if not pair.speaks:
        raise ModelError(f"{pair.model.location}: has no talker, so there is no speech to keep")
    source = match_source(pair.model)
    check_memory(pair.model, device, speech=True, dtype=DTYPE)
    samples = [encode(sample, pair.processor, pair.config) for sample in chosen]
    with (
        suited_threads(int(pair.config.thinker_config.text_config.hidden_size), device),
        CheckpointReader(pair.model) as reader,
    ):
        search = _Search(pair, source, reader, samples, base, settings, device, progress or (lambda *_: None))
        return search.run(begin)


def _checked(settings: SpeechSearchSettings) -> Recipe:
    if not settings.times_floor > 0:
        raise OmniFP4Error(f"--times-floor is {settings.times_floor}", hint="allowed: a number above 0, such as 10")
    if not settings.schemes or Scheme.WIDE in settings.schemes:
        told = ", ".join(scheme for scheme in Scheme if not scheme.is_wide)
        raise OmniFP4Error("schemes to try: one or more are needed, all narrower than bf16", hint=f"allowed: {told}")
    if settings.name in RECIPES:
        raise OmniFP4Error(f"recipe name {settings.name!r} is that of a bundled recipe", hint="choose another")
    if not 1 <= len(settings.name) <= MOST_NAME:
        raise OmniFP4Error(
            f"recipe name {settings.name[:20]!r}… has {len(settings.name)} characters", hint=f"1 to {MOST_NAME}"
        )
    base = find_recipe(settings.base)
    if base.need is not Need.NOTHING:
        raise OmniFP4Error(
            f"recipe {base.name!r} looks at inputs, and a search rounds without them",
            hint="--base nvfp4; method and weighting may be written into the file afterwards",
        )
    if any(name.startswith(tuple(part.value for part in SPEAKING)) for name in base.components):
        raise OmniFP4Error(
            f"recipe {base.name!r} says what happens to the talker, which is what is searched", hint="--base nvfp4"
        )
    return base


class _Search:
    def __init__(
        self,
        pair: Pair,
        source: Source,
        reader: CheckpointReader,
        samples: list[EncodedSample],
        base: Recipe,
        settings: SpeechSearchSettings,
        device: torch.device,
        tell: Progress,
    ) -> None:
        self.pair, self.source, self.reader, self.samples = pair, source, reader, samples
        self.base, self.settings, self.device, self.tell = base, settings, device, tell
        self.listen = load_listener() if any(is_digit(one.sample.answer or "") for one in samples) else None
        self.parts = {
            "omnifp4": package_version(), "reference": checkpoint_key(pair.reference), "dtype": "bfloat16",
            "device": arithmetic_of_device(device),
        }  # fmt: skip
        self.schemes = sorted(settings.schemes, key=_bits)
        self.groups = tuple(group for group in groups_of(source, SPEAKING) if _kind(group) not in NEVER)
        wanted = choose_schemes(source.layout, base, {})
        by_name = {component.name: scheme for component, scheme in wanted.items() if not scheme.is_wide}
        others = tuple(part for part in Part if part not in SPEAKING)
        self.base_schemes = {g: by_name[g.name] for g in groups_of(source, others) if g.name in by_name}
        self.stores: list[Store] = []
        self.model: Any = None
        self.rounder: Rounder | None = None
        self.done = 0
        self.runs = 4 + sum(group.holds(scheme) for group in self.groups for scheme in self.schemes)
        self.reference: list[SpokenReference] = []
        self.floor: SpeechFloor | None = None

    def run(self, begin: float) -> SpeechSearchReceipt:
        self._speak_first()
        base_alone = self._trial(f"recipe {self.base.name}", self.base_schemes)
        trials: dict[tuple[Group, Scheme], SpeechTrial] = {}
        for group in self.groups:
            for scheme in self.schemes:
                if group.holds(scheme):
                    trials[group, scheme] = self._trial(group.name, {group: scheme})
        together, chosen = self._together(trials)
        with_base = None
        if chosen:
            with_base = self._trial(f"with recipe {self.base.name}", {**self.base_schemes, **chosen})
        for store in self.stores:
            store.remove()
        assert self.floor is not None
        names = {group.name: scheme.value for group, scheme in chosen.items()}
        return SpeechSearchReceipt(
            model=as_text(self.pair.model.location), model_type=str(self.pair.model.config["model_type"]),
            data=as_text(str(self.settings.data)), data_sha256=data_digest(self.samples),
            utterances=len(self.samples), frames=sum(len(one.utterance.codes) for one in self.reference),
            long_utterances=len(long_utterances(self.reference)), base=self.base.name, rule=self.base.rule_name,
            times_floor=self.settings.times_floor, floor=self.floor, trials=tuple(trials.values()),
            base_alone=base_alone, together=tuple(together), with_base=with_base, chosen=names,
            recipe=self._recipe(names), device=name_of_device(self.device), seed=self.settings.seed,
            seconds=time.monotonic() - begin, environment=this_environment(),
        )  # fmt: skip

    def _recipe(self, chosen: Mapping[str, str]) -> dict[str, Any]:
        made = self.base.model_copy(
            update={
                "name": self.settings.name,
                "version": 1,
                "title": f"{self.base.name}, and of the talker what its speech bears",
                "components": {**self.base.components, **{name: Scheme(value) for name, value in chosen.items()}},
            }
        )
        return made.model_dump(mode="json")

    def _speak_first(self) -> None:
        """The wide model's speech, and its noise floor."""
        store = Store(self.settings.cache, content_key("reference", self.parts))
        talkers: dict[str, Talker] = {}

        def talker(attention: str) -> Talker:
            if attention not in talkers:
                talkers[attention] = self._talker(attention)
            return talkers[attention]

        self.reference, again = speak_reference(
            self.samples, talker, store, floor=True, tell=self._telling("reference")
        )
        self.floor = self._figures(again)
        self.done += 1

    def _talker(self, attention: str = ATTENTION) -> Talker:
        if self.model is None:
            from omnifp4.runtime import load

            self.model = load(self.pair.model.location, device=self.device, dtype=DTYPE, speech=True, progress=False)
            self.rounder = Rounder(self.model, self.source, self.reader, self.base.rule)
        return Talker(self.model, self.pair.model.location, self.listen, attention)

    def _figures(self, side: Sequence[SpokenSide]) -> SpeechFloor:
        answers = [one.sample.answer or "" for one in self.samples]
        return SpeechFloor(**side_figures(answers, self.reference, side, seed=self.settings.seed))

    def _trial(self, name: str, schemes: Mapping[Group, Scheme]) -> SpeechTrial:
        """Speech with these groups rounded."""
        identity = "|".join(f"{group.name}={scheme}" for group, scheme in schemes.items())
        key = self.parts | {"trial": identity, "rule": self.base.rule.value}
        store = Store(self.settings.cache, content_key("speech-search", key))
        self.stores.append(store)
        talker = self._talker()
        assert self.rounder is not None
        with self.rounder.rounded(schemes):
            side = speak_model(
                self.samples, self.reference, lambda: talker, store, tell=self._telling(_title(name, schemes))
            )
        self.done += 1
        gc.collect()
        figures = self._figures(side)
        return SpeechTrial(
            name=name, schemes={group.name: scheme.value for group, scheme in schemes.items()},
            parameters=sum(group.parameters for group in schemes),
            bytes_before=sum(tensor.nbytes for group in schemes for tensor in group.tensors),
            bytes_after=sum(stored_bytes(group, scheme) for group, scheme in schemes.items()),
            speech=figures, exceeds=tuple(self._exceeded(figures)),
        )  # fmt: skip

    def _exceeded(self, figures: SpeechFloor) -> Iterator[str]:
        assert self.floor is not None
        return exceeded(figures, self.floor, self.settings.times_floor)

    def _together(
        self, trials: Mapping[tuple[Group, Scheme], SpeechTrial]
    ) -> tuple[list[SpeechTrial], dict[Group, Scheme]]:
        """What each component bears alone, all at once; while that is too much, the one that does most is widened."""
        borne = {
            group: [
                scheme for scheme in self.schemes if (group, scheme) in trials and not trials[group, scheme].exceeds
            ]
            for group in self.groups
        }
        chosen = {group: schemes[0] for group, schemes in borne.items() if schemes}
        tried: list[SpeechTrial] = []
        while chosen:
            tried.append(self._trial("together", chosen))
            if not tried[-1].exceeds:
                break
            worst = max(chosen, key=lambda group: self._damage(trials[group, chosen[group]].speech))
            damage = self._damage(trials[worst, chosen[worst]].speech)
            wider = [
                scheme
                for scheme in borne[worst]
                if _bits(scheme) > _bits(chosen[worst]) and self._damage(trials[worst, scheme].speech) < damage
            ]
            if wider:
                chosen[worst] = wider[0]
            else:
                del chosen[worst]
            self.runs += 1
        return tried, chosen

    def _damage(self, figures: SpeechFloor) -> float:
        assert self.floor is not None
        return max(_ratios(figures, self.floor).values())

    def _telling(self, name: str) -> Progress:
        count = len(self.samples)
        return lambda done, total, item: self.tell(
            self.done * count + done, max(self.runs, self.done + 1) * count, f"{name}, {item}"
        )


def exceeded(figures: SpeechFloor, floor: SpeechFloor, times: float) -> Iterator[str]:
    """The limits that some speech is beyond, in words.

    Args:
        figures: of the speech.
        floor: of the wide model's own under another attention.
        times: of the floor's divergences that are allowed.
    """
    for name, ratio in _ratios(figures, floor).items():
        if ratio > times:
            yield f"{name} is {ratio:.4g} times the floor's"
    heard = figures.recognition
    if heard is not None and heard.difference.high < 0:
        yield f"{-heard.difference.value:.1%} of the digits are no longer understood"
    if abs(figures.frames_ratio - 1) > FRAMES_OFF:
        yield f"it is {figures.frames_ratio:.3g} times as long"
    if figures.non_finite:
        yield f"{figures.non_finite} utterances are not finite"


def _ratios(figures: SpeechFloor, floor: SpeechFloor) -> dict[str, float]:
    """Divergences over those of the floor. Of the quarters of long utterances the floor's largest is the measure of all."""
    found = {"KL of the first codes": _ratio(figures.code_kl_mean.value, floor.code_kl_mean.value)}
    if figures.later_code_kl_mean is not None and floor.later_code_kl_mean is not None:
        later, noise = figures.later_code_kl_mean.value, floor.later_code_kl_mean.value
        found["KL of the later codes"] = _ratio(later, noise)
    if figures.drift and floor.drift:
        largest = max(quarter.value for quarter in floor.drift)
        for number, quarter in enumerate(figures.drift, start=1):
            found[f"KL in quarter {number} of long speech"] = _ratio(quarter.value, largest)
    return found


def _ratio(value: float, noise: float) -> float:
    return value / noise if noise else math.inf if value else 0.0


def stored_bytes(group: Group, scheme: Scheme) -> int:
    """Codes and scales of a group; INT8 as compressed-tensors stores it, the others are alike in both dialects."""
    stored = (stored_tensors(tensor, scheme, OutputFormat.COMPRESSED_TENSORS) for tensor in group.tensors)
    return sum(byte_count(one.dtype, one.shape) for tensors in stored for one in tensors)


def _bits(scheme: Scheme) -> int:
    """Sorts schemes: fewer bits first, and of the 4-bit ones NVFP4, which errs less, before MXFP4."""
    return (Scheme.NVFP4, Scheme.MXFP4, Scheme.FP8, Scheme.INT8, Scheme.WIDE).index(scheme)


def _kind(group: Group) -> Kind:
    return group.tensors[0].spec.component.kind


def _title(name: str, schemes: Mapping[Group, Scheme]) -> str:
    return f"{name} in {next(iter(schemes.values()))}" if len(schemes) == 1 else name
