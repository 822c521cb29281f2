"""`evaluate`: everything is checked first, then the reference runs, then each model, then figures and limits."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.evaluation.data import limited, read_data
from omnifp4.evaluation.devices import arithmetic_of_device, find_device, name_of_device
from omnifp4.evaluation.distributions import Scores, kept_of
from omnifp4.evaluation.encoding import EncodedSample, data_digest, encode
from omnifp4.evaluation.gates import Limits, judge
from omnifp4.evaluation.layers import compare_layers
from omnifp4.evaluation.listening import load_listener
from omnifp4.evaluation.pair import Pair, check_memory, fits, open_pair
from omnifp4.evaluation.results import modality_results, task_results
from omnifp4.evaluation.scoring import ReferenceScores, score_model, score_reference
from omnifp4.evaluation.sides import ATTENTION, OTHER_ATTENTION, SegmentedSide, Side, WholeSide
from omnifp4.evaluation.speech import SpokenReference, SpokenSide, Talker, speak_model, speak_reference
from omnifp4.evaluation.speech_results import is_digit, speech_result
from omnifp4.evaluation.statistics import RESAMPLES
from omnifp4.evaluation.store import Store, checkpoint_key, content_key
from omnifp4.evaluation.threads import suited_threads
from omnifp4.receipt.base import Verdict, as_text, package_version, this_environment
from omnifp4.receipt.evaluation import EvaluationReceipt, SpeechResult

UNDERSTOOD: Final = 0.5
"""Of the reference's spoken digits: where the listener hears fewer, it is told that it does not know the voice."""

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to evaluate.

    Attributes:
        data: ``"bundled"`` or a JSONL file.
        segmented: run the reference layer by layer from disk, and the model too if it does not fit into memory.
        layers: compare hidden states after this many layers and do no more.
        device: ``"auto"`` takes the first GPU, or the CPU.
        dtype: of both sides, ``bfloat16`` or ``float32``.
        speech: judge speech where both sides have a talker.
        floor: run the reference a second time for the noise floor.
        cache: folder of what was worked out before; None keeps nothing.
        samples: use only so many of each task and modality, spoken or not; None uses all.
        seed: of the intervals.
        limits: see `Limits`.
    """

    data: str | Path
    segmented: bool
    layers: int | None
    device: str
    dtype: str
    speech: bool
    floor: bool
    cache: Path | None
    samples: int | None
    seed: int
    limits: Limits


def run_evaluation(model: Path, against: Path, settings: Settings, progress: Progress | None) -> EvaluationReceipt:
    """Evaluate a model against its reference.

    Raises:
        OmniFP4Error: anything about pair, data, memory or limits that is not right; before weights are read, but for
            logits that are no numbers.
    """
    begin = time.monotonic()
    run = prepare([model], against, settings, progress)
    with run.threads():
        return run.layers(begin) if settings.layers is not None else run.whole(begin).models[0].receipt


def prepare(models: Sequence[Path], against: Path, settings: Settings, progress: Progress | None) -> EvaluationRun:
    """Check and read everything that can be checked before weights are read.

    Args:
        models: that are to be evaluated on the same samples, one after the other.
        against: reference of all of them.
        settings: see there.
        progress: called with steps done, steps in all, and what was worked on.

    Raises:
        OmniFP4Error: anything about a pair, the data or the limits that is not right.
    """
    if settings.dtype not in DTYPES:
        raise OmniFP4Error(f"dtype is {settings.dtype!r}", hint=f"allowed: {', '.join(DTYPES)}")
    if settings.seed < 0:
        raise OmniFP4Error(f"--seed is {settings.seed}", hint="0 or more")
    settings.limits.check()
    if settings.layers is not None:
        if settings.layers < 1:
            raise OmniFP4Error(f"--layers is {settings.layers}", hint="1 or more")
        if not settings.limits.is_empty:
            raise OmniFP4Error("limits are for logits, which --layers never makes", hint="leave one of them out")
    device = find_device(settings.device)
    chosen = limited(read_data(settings.data), settings.samples)
    pairs = [open_pair(model, against) for model in models]
    samples = [encode(sample, pairs[0].processor, pairs[0].config) for sample in chosen]
    return EvaluationRun(pairs, samples, settings, device, progress or (lambda *_: None))


@dataclass(frozen=True)
class Judged:
    """What one model gave.

    Attributes:
        pair: it and the reference.
        scores: of each sample, against the reference.
        spoken: of each sample that is spoken; empty where speech was not judged.
        receipt: its record.
    """

    pair: Pair
    scores: list[Scores]
    spoken: list[SpokenSide]
    receipt: EvaluationReceipt


@dataclass(frozen=True)
class Judgement:
    """What all sides gave.

    Attributes:
        samples: that all of them read.
        said: what the reference said of those that are spoken; empty where speech was not judged.
        models: in the order in which they were given.
    """

    samples: list[EncodedSample]
    said: list[SpokenReference]
    models: list[Judged]


class EvaluationRun:
    """One reference and the models that are judged against it, all on the same samples."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        samples: list[EncodedSample],
        settings: Settings,
        device: torch.device,
        tell: Progress,
    ) -> None:
        """See `prepare`."""
        self.pairs, self.samples, self.settings, self.device, self.tell = list(pairs), samples, settings, device, tell
        self.reference, self.config = pairs[0].reference, pairs[0].config
        self.dtype = DTYPES[settings.dtype]
        self.spoken = [sample for sample in samples if sample.sample.speak]
        self.speaking = [self._speaks(pair) for pair in pairs]
        self.speech = any(self.speaking)
        self.with_talker = {"reference": self.speech}
        self.with_talker |= {self._name(number): speaks for number, speaks in enumerate(self.speaking)}
        digits = self.speech and any(is_digit(sample.sample.answer or "") for sample in self.spoken)
        self.listen = load_listener() if digits else None
        self.segmented: set[str] = set()
        self.opened: dict[str, Side] = {}
        self.talkers: dict[tuple[str, str], Talker] = {}

    @contextmanager
    def threads(self) -> Iterator[None]:
        """As many threads inside as suit the model's width."""
        with suited_threads(int(self.config.thinker_config.text_config.hidden_size), self.device):
            yield

    def whole(self, begin: float) -> Judgement:
        """Run the reference, then each model. `begin` is the monotonic time that the first record counts from."""
        settings = self.settings
        self.settings.limits.check_data(
            tasks=any(sample.sample.task for sample in self.samples), digits=self.listen is not None,
            speech=all(self.speaking),
        )  # fmt: skip
        self._check_memory()
        parts = {
            "omnifp4": package_version(), "reference": checkpoint_key(self.reference), "dtype": settings.dtype,
            "device": arithmetic_of_device(self.device),
        }  # fmt: skip
        store = Store(settings.cache, content_key("reference", parts))
        reference = score_reference(
            self.samples, lambda: self._side("reference", self.reference), store, floor=settings.floor,
            tell=self._telling("reference"),
        )  # fmt: skip
        said: list[SpokenReference] = []
        said_again: list[SpokenSide] = []
        if self.speech:
            said, said_again = speak_reference(
                self.spoken, lambda attention: self._talker("reference", self.reference, attention), store,
                floor=settings.floor, tell=self._telling("reference speaks"),
            )  # fmt: skip
        models, stores = [], []
        for number, pair in enumerate(self.pairs):
            # The model gets the memory of the reference, or of the model before.
            self._forget_loaded()
            # Only for a run that goes on: what the model gives depends on kernels, which no key knows.
            judged = Store(settings.cache, content_key("model", parts | {"model": checkpoint_key(pair.model)}))
            stores.append(judged)
            models.append(self._judge(number, reference, said, said_again, judged, begin))
            begin = time.monotonic()
        self._forget_loaded()
        for judged in stores:
            judged.remove()
        return Judgement(self.samples, said, models)

    def _judge(
        self,
        number: int,
        reference: ReferenceScores,
        said: list[SpokenReference],
        said_again: list[SpokenSide],
        store: Store,
        begin: float,
    ) -> Judged:
        """One model against what the reference gave."""
        settings, pair, name = self.settings, self.pairs[number], self._name(number)
        notes = self._notes(number)
        model = score_model(
            self.samples, reference, lambda: self._side(name, pair.model), store, tell=self._telling(name)
        )
        self._refuse_no_numbers(pair, model)
        spoken: list[SpokenSide] = []
        speech: SpeechResult | None = None
        if self.speaking[number]:
            spoken = speak_model(
                self.spoken, said, lambda: self._talker(name, pair.model, ATTENTION), store,
                tell=self._telling(f"{name} speaks"),
            )  # fmt: skip
            speech = speech_result(self.spoken, said, spoken, said_again, seed=settings.seed)
            notes += _listener_note(speech)
        modalities = modality_results(self.samples, reference.own, model, reference.floor, seed=settings.seed)
        tasks = task_results(self.samples, reference.own, model, reference.floor)
        gates = judge(settings.limits, modalities, tasks, speech)
        failed = any(gate.verdict is Verdict.FAIL for gate in gates)
        receipt = self._receipt(
            pair, begin, notes,
            segmented=tuple(told for told, side in (("reference", "reference"), ("model", name)) if side in self.segmented),
            modalities=modalities, tasks=tasks, speech=speech, gates=gates, reference_cached=reference.cached,
            verdict=Verdict.FAIL if failed else Verdict.PASS if gates else Verdict.NOT_CHECKED,
        )  # fmt: skip
        return Judged(pair, model, spoken, receipt)

    def layers(self, begin: float) -> EvaluationReceipt:
        """Compare hidden states of the first model; see `Settings.layers`."""
        assert self.settings.layers is not None
        (pair,) = self.pairs
        found = compare_layers(
            pair.model, pair.reference, self.samples, layers=self.settings.layers, device=self.device,
            dtype=self.dtype, floor=self.settings.floor, tell=self.tell,
        )  # fmt: skip
        return self._receipt(
            pair, begin, self._notes(0), segmented=("reference", "model"), layers=found, verdict=Verdict.NOT_CHECKED
        )

    def _receipt(self, pair: Pair, begin: float, notes: Sequence[str], **results: Any) -> EvaluationReceipt:
        text = self.config.thinker_config.text_config
        empty = {"modalities": (), "tasks": (), "speech": None, "layers": (), "gates": (), "reference_cached": 0}
        floor = f"the reference with {OTHER_ATTENTION} attention in place of {ATTENTION}" if self.settings.floor else ""
        return EvaluationReceipt(
            model=as_text(pair.model.location), against=as_text(pair.reference.location),
            model_type=str(pair.reference.config["model_type"]), data=as_text(str(self.settings.data)),
            data_sha256=data_digest(self.samples), samples=len(self.samples), dtype=self.settings.dtype,
            device=name_of_device(self.device), attention=ATTENTION, noise_floor=floor or "not run",
            distributions=kept_of(int(text.vocab_size)), seed=self.settings.seed, resamples=RESAMPLES,
            notes=tuple(notes), seconds=time.monotonic() - begin,
            peak_memory_bytes=_peak_bytes(), environment=this_environment(), **(empty | results),
        )  # fmt: skip

    def _name(self, number: int) -> str:
        """Of a model, in what is told of the progress."""
        return "model" if len(self.pairs) == 1 else f"model {number + 1} of {len(self.pairs)}"

    def _speaks(self, pair: Pair) -> bool:
        return self._speech_is_wanted and pair.speaks and not self.settings.segmented

    @property
    def _speech_is_wanted(self) -> bool:
        return self.settings.speech and bool(self.spoken) and self.settings.layers is None

    def _notes(self, number: int) -> list[str]:
        """What differs in a pair, and why it was not heard."""
        pair = self.pairs[number]
        notes = [*pair.notes]
        if self._speech_is_wanted and not pair.speaks:
            notes.append("speech was not judged: one of the two has no talker")
        elif self._speech_is_wanted and self.settings.segmented:
            notes.append("speech was not judged: a talker needs the whole model in memory")
        return notes

    def _check_memory(self) -> None:
        if not self.settings.segmented:
            check_memory(self.reference, self.device, speech=self.speech, dtype=self.dtype)
            for pair, speaks in zip(self.pairs, self.speaking, strict=True):
                check_memory(pair.model, self.device, speech=speaks, dtype=self.dtype)
            return
        self.segmented = {"reference"}
        for number, pair in enumerate(self.pairs):
            if not fits(pair.model, self.device, speech=False, dtype=self.dtype):
                self.segmented.add(self._name(number))

    def _refuse_no_numbers(self, pair: Pair, model: Sequence[Scores]) -> None:
        for modality in dict.fromkeys(sample.sample.modality for sample in self.samples):
            chosen = [
                scores for sample, scores in zip(self.samples, model, strict=True) if sample.sample.modality == modality
            ]
            if not any(scores.finite.any() for scores in chosen):
                raise CheckpointError(
                    f"{pair.model.location}: its logits are not finite at any of {sum(len(s.kl) for s in chosen)} "
                    f"positions of {modality}: its weights are damaged",
                    hint=f"omnifp4 verify {pair.model.location}",
                )

    def _telling(self, name: str) -> Progress:
        return lambda done, total, item: self.tell(done, total, f"{name}, {item}")

    def _forget_loaded(self) -> None:
        self.talkers.clear()
        self.opened.clear()
        gc.collect()

    def _talker(self, name: str, checkpoint: Checkpoint, attention: str) -> Talker:
        if (name, attention) not in self.talkers:
            side = self._side(name, checkpoint)
            assert isinstance(side, WholeSide), "speech is not judged of a side in segments"
            self.talkers[name, attention] = Talker(side.model, checkpoint.location, self.listen, attention)
        return self.talkers[name, attention]

    def _side(self, name: str, checkpoint: Checkpoint) -> Side:
        if name not in self.opened:
            self.opened[name] = self._open(name, checkpoint)
        return self.opened[name]

    def _open(self, name: str, checkpoint: Checkpoint) -> Side:
        if name in self.segmented:
            work = None
            if self.settings.cache is not None:
                key = {"checkpoint": checkpoint_key(checkpoint), "data": data_digest(self.samples)}
                key |= {"dtype": self.settings.dtype, "device": arithmetic_of_device(self.device)}
                work = self.settings.cache / content_key("states", key)
            return SegmentedSide(
                checkpoint, device=self.device, dtype=self.dtype, work=work,
                progress=lambda done, total, item: self.tell(done, total, f"{name}, {item}"),
            )  # fmt: skip
        from omnifp4.runtime import load

        speech = self.with_talker[name]
        loaded = load(checkpoint.location, device=self.device, dtype=self.dtype, speech=speech, progress=False)
        return WholeSide(loaded)


def _listener_note(speech: SpeechResult) -> list[str]:
    if speech.recognition is None or speech.recognition.reference >= UNDERSTOOD:
        return []
    return [
        f"the classifier understands {speech.recognition.reference:.0%} of the digits that the reference speaks: "
        "it does not know this voice, and what it says of the model means little"
    ]


def _peak_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
