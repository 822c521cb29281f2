"""`evaluate`: everything is checked first, then the reference runs, then the model, then figures and limits."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Sequence
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
from omnifp4.evaluation.scoring import score_model, score_reference
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
    if settings.dtype not in DTYPES:
        raise OmniFP4Error(f"dtype is {settings.dtype!r}", hint=f"allowed: {', '.join(DTYPES)}")
    settings.limits.check()
    if settings.layers is not None:
        if settings.layers < 1:
            raise OmniFP4Error(f"--layers is {settings.layers}", hint="1 or more")
        if not settings.limits.is_empty:
            raise OmniFP4Error("limits are for logits, which --layers never makes", hint="leave one of them out")
    device = find_device(settings.device)
    chosen = limited(read_data(settings.data), settings.samples)
    pair = open_pair(model, against)
    samples = [encode(sample, pair.processor, pair.config) for sample in chosen]
    run = _Run(pair, samples, settings, device, progress or (lambda *_: None))
    with suited_threads(int(pair.config.thinker_config.text_config.hidden_size), device):
        return run.layers(begin) if settings.layers is not None else run.whole(begin)


class _Run:
    def __init__(
        self, pair: Pair, samples: list[EncodedSample], settings: Settings, device: torch.device, tell: Progress
    ) -> None:
        self.pair, self.samples, self.settings, self.device, self.tell = pair, samples, settings, device, tell
        self.dtype = DTYPES[settings.dtype]
        self.notes: list[str] = [*pair.notes]
        self.segmented: list[str] = []
        self.spoken = [sample for sample in samples if sample.sample.speak]
        self.speech = self._wants_speech()
        digits = self.speech and any(is_digit(sample.sample.answer or "") for sample in self.spoken)
        self.listen = load_listener() if digits else None
        self.opened: dict[str, Side] = {}
        self.talkers: dict[tuple[str, str], Talker] = {}

    def whole(self, begin: float) -> EvaluationReceipt:
        settings, pair = self.settings, self.pair
        self.settings.limits.check_data(
            tasks=any(sample.sample.task for sample in self.samples), digits=self.listen is not None, speech=self.speech
        )
        self._check_memory()
        parts = {
            "omnifp4": package_version(), "reference": checkpoint_key(pair.reference), "dtype": settings.dtype,
            "device": arithmetic_of_device(self.device),
        }  # fmt: skip
        store = Store(settings.cache, content_key("reference", parts))
        # Only for a run that goes on: what the model gives depends on kernels, which no key knows.
        judged = Store(settings.cache, content_key("model", parts | {"model": checkpoint_key(pair.model)}))

        reference = score_reference(
            self.samples, lambda: self._side("reference", pair.reference), store, floor=settings.floor,
            tell=self._telling("reference"),
        )  # fmt: skip
        said: list[SpokenReference] = []
        said_again: list[SpokenSide] = []
        if self.speech:
            said, said_again = speak_reference(
                self.spoken, lambda attention: self._talker("reference", pair.reference, attention), store,
                floor=settings.floor, tell=self._telling("reference speaks"),
            )  # fmt: skip
        # The model gets the reference's memory.
        self.talkers.clear()
        self.opened.clear()
        gc.collect()
        model = score_model(
            self.samples, reference, lambda: self._side("model", pair.model), judged, tell=self._telling("model")
        )
        self._refuse_no_numbers(model)
        speech: SpeechResult | None = None
        if self.speech:
            spoken = speak_model(
                self.spoken, said, lambda: self._talker("model", pair.model, ATTENTION), judged,
                tell=self._telling("model speaks"),
            )  # fmt: skip
            speech = speech_result(self.spoken, said, spoken, said_again, seed=settings.seed)
            self._note_the_listener(speech)
        modalities = modality_results(self.samples, reference.own, model, reference.floor, seed=settings.seed)
        tasks = task_results(self.samples, reference.own, model, reference.floor)
        gates = judge(settings.limits, modalities, tasks, speech)
        failed = any(gate.verdict is Verdict.FAIL for gate in gates)
        judged.remove()
        return self._receipt(
            begin, modalities=modalities, tasks=tasks, speech=speech, gates=gates, reference_cached=reference.cached,
            verdict=Verdict.FAIL if failed else Verdict.PASS if gates else Verdict.NOT_CHECKED,
        )  # fmt: skip

    def layers(self, begin: float) -> EvaluationReceipt:
        assert self.settings.layers is not None
        found = compare_layers(
            self.pair.model, self.pair.reference, self.samples, layers=self.settings.layers, device=self.device,
            dtype=self.dtype, floor=self.settings.floor, tell=self.tell,
        )  # fmt: skip
        self.segmented = ["reference", "model"]
        return self._receipt(begin, layers=found, verdict=Verdict.NOT_CHECKED)

    def _receipt(self, begin: float, **results: Any) -> EvaluationReceipt:
        text = self.pair.config.thinker_config.text_config
        empty = {"modalities": (), "tasks": (), "speech": None, "layers": (), "gates": (), "reference_cached": 0}
        floor = f"the reference with {OTHER_ATTENTION} attention in place of {ATTENTION}" if self.settings.floor else ""
        return EvaluationReceipt(
            model=as_text(self.pair.model.location), against=as_text(self.pair.reference.location),
            model_type=str(self.pair.reference.config["model_type"]), data=as_text(str(self.settings.data)),
            data_sha256=data_digest(self.samples), samples=len(self.samples), dtype=self.settings.dtype,
            device=name_of_device(self.device), attention=ATTENTION, segmented=tuple(self.segmented),
            noise_floor=floor or "not run",
            distributions=kept_of(int(text.vocab_size)), seed=self.settings.seed, resamples=RESAMPLES,
            notes=tuple(self.notes), seconds=time.monotonic() - begin,
            peak_memory_bytes=_peak_bytes(), environment=this_environment(), **(empty | results),
        )  # fmt: skip

    def _wants_speech(self) -> bool:
        if not self.settings.speech or not self.spoken or self.settings.layers is not None:
            return False
        if not self.pair.speaks:
            self.notes.append("speech was not judged: one of the two has no talker")
        elif self.settings.segmented:
            self.notes.append("speech was not judged: a talker needs the whole model in memory")
        return self.pair.speaks and not self.settings.segmented

    def _check_memory(self) -> None:
        if not self.settings.segmented:
            check_memory(self.pair.reference, self.device, speech=self.speech, dtype=self.dtype)
            check_memory(self.pair.model, self.device, speech=self.speech, dtype=self.dtype)
            return
        self.segmented = ["reference"]
        if not fits(self.pair.model, self.device, speech=False, dtype=self.dtype):
            self.segmented.append("model")

    def _refuse_no_numbers(self, model: Sequence[Scores]) -> None:
        for modality in dict.fromkeys(sample.sample.modality for sample in self.samples):
            chosen = [
                scores for sample, scores in zip(self.samples, model, strict=True) if sample.sample.modality == modality
            ]
            if not any(scores.finite.any() for scores in chosen):
                raise CheckpointError(
                    f"{self.pair.model.location}: its logits are not finite at any of {sum(len(s.kl) for s in chosen)} "
                    f"positions of {modality}: its weights are damaged",
                    hint=f"omnifp4 verify {self.pair.model.location}",
                )

    def _note_the_listener(self, speech: SpeechResult) -> None:
        if speech.recognition is not None and speech.recognition.reference < UNDERSTOOD:
            self.notes.append(
                f"the classifier understands {speech.recognition.reference:.0%} of the digits that the reference speaks: "
                "it does not know this voice, and what it says of the model means little"
            )

    def _telling(self, name: str) -> Progress:
        return lambda done, total, item: self.tell(done, total, f"{name}, {item}")

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

        loaded = load(checkpoint.location, device=self.device, dtype=self.dtype, speech=self.speech, progress=False)
        return WholeSide(loaded)


def _peak_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
