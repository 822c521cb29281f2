"""`evaluate`: everything is checked first, then the reference runs, then the model, then figures and limits."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.evaluation.data import read_data
from omnifp4.evaluation.distributions import kept_of
from omnifp4.evaluation.encoding import EncodedSample, data_digest, encode
from omnifp4.evaluation.gates import Limits, judge
from omnifp4.evaluation.layers import compare_layers
from omnifp4.evaluation.listening import find_listener
from omnifp4.evaluation.pair import Pair, check_memory, fits, open_pair
from omnifp4.evaluation.results import modality_results, task_results
from omnifp4.evaluation.scoring import score_model, score_reference
from omnifp4.evaluation.sides import ATTENTION, OTHER_ATTENTION, SegmentedSide, Side, WholeSide
from omnifp4.evaluation.statistics import RESAMPLES
from omnifp4.evaluation.store import Store, checkpoint_key, content_key
from omnifp4.evaluation.threads import suited_threads
from omnifp4.receipt.base import Verdict, as_text, this_environment
from omnifp4.receipt.evaluation import EvaluationReceipt, SpeechResult

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
    device = _device(settings.device)
    chosen = _limited(read_data(settings.data), settings.samples)
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
        self.notes: list[str] = []
        self.segmented: list[str] = []
        self.spoken = [sample for sample in samples if sample.sample.speak]
        self.speech = self._wants_speech()

    def whole(self, begin: float) -> EvaluationReceipt:
        settings = self.settings
        self._check_memory()
        reference_key = checkpoint_key(self.pair.reference)
        parts = {"reference": reference_key, "dtype": settings.dtype, "device": self.device.type}
        store = Store(settings.cache, content_key("reference", parts))
        model_parts = parts | {"model": checkpoint_key(self.pair.model)}
        model_store = Store(settings.cache, content_key("model", model_parts))
        listen = find_listener(self.pair.reference.config) if self.speech else None

        opened: dict[str, Side] = {}

        def side(name: str, checkpoint: Checkpoint) -> Side:
            if name not in opened:
                opened[name] = self._open(name, checkpoint)
            return opened[name]

        def talker(name: str, checkpoint: Checkpoint) -> Any:
            from omnifp4.evaluation.speech import Talker

            whole = side(name, checkpoint)
            assert isinstance(whole, WholeSide)
            return Talker(whole.model, listen)

        def tell(name: str) -> Progress:
            return lambda done, total, item: self.tell(done, total, f"{name}, {item}")

        reference = score_reference(
            self.samples, lambda: side("reference", self.pair.reference), store, floor=settings.floor,
            tell=tell("reference"),
        )  # fmt: skip
        said = []
        if self.speech:
            from omnifp4.evaluation.speech import speak_reference

            said = speak_reference(
                self.spoken, lambda: talker("reference", self.pair.reference), store, tell("reference speaks")
            )
        opened.clear()
        gc.collect()
        model = score_model(
            self.samples, reference, lambda: side("model", self.pair.model), model_store, tell=tell("model")
        )
        if not any(scores.finite.any() for scores in model):
            raise CheckpointError(
                f"{self.pair.model.location}: not one of its logits is finite: its weights are damaged",
                hint=f"omnifp4 verify {self.pair.model.location}",
            )
        speech: SpeechResult | None = None
        if self.speech:
            from omnifp4.evaluation.speech import compare_speech

            speech = compare_speech(
                self.spoken, said, talker("model", self.pair.model), recognised=listen is not None,
                seed=settings.seed, tell=tell("model speaks"),
            )  # fmt: skip
        modalities = modality_results(self.samples, reference.own, model, reference.floor, seed=settings.seed)
        tasks = task_results(self.samples, reference.own, model, reference.floor, seed=settings.seed)
        gates = judge(settings.limits, modalities, tasks, speech)
        failed = any(gate.verdict is Verdict.FAIL for gate in gates)
        return self._receipt(
            begin, modalities=modalities, tasks=tasks, speech=speech, gates=gates, reference_cached=reference.cached,
            verdict=Verdict.FAIL if failed else Verdict.PASS if gates else Verdict.NOT_CHECKED,
        )  # fmt: skip

    def layers(self, begin: float) -> EvaluationReceipt:
        assert self.settings.layers is not None
        if self.settings.layers < 1:
            raise OmniFP4Error(f"--layers is {self.settings.layers}", hint="1 or more")
        if any(getattr(self.settings.limits, name) is not None for name in Limits.__slots__):
            raise OmniFP4Error("limits are for logits, which --layers never makes", hint="leave one of them out")
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
            device=_device_name(self.device), attention=ATTENTION, segmented=tuple(self.segmented),
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
            check_memory(self.pair.reference, self.device, speech=self.speech)
            check_memory(self.pair.model, self.device, speech=self.speech)
            return
        self.segmented = ["reference"]
        if not fits(self.pair.model, self.device, speech=False):
            self.segmented.append("model")

    def _open(self, name: str, checkpoint: Checkpoint) -> Side:
        if name in self.segmented:
            work = None
            if self.settings.cache is not None:
                key = {"checkpoint": checkpoint_key(checkpoint), "data": data_digest(self.samples)}
                work = self.settings.cache / content_key("states", key | {"dtype": self.settings.dtype})
            return SegmentedSide(
                checkpoint, device=self.device, dtype=self.dtype, work=work,
                progress=lambda done, total, item: self.tell(done, total, f"{name}, {item}"),
            )  # fmt: skip
        from omnifp4.runtime import load

        loaded = load(checkpoint.location, device=self.device, dtype=self.dtype, speech=self.speech, progress=False)
        return WholeSide(loaded)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OmniFP4Error(f"device is {name!r}", hint="allowed: auto, cpu, cuda, cuda:0 …") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OmniFP4Error(f"device {name!r} was asked for, and torch sees no GPU", hint="omnifp4 doctor tells why")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _limited(samples: tuple[Any, ...], most: int | None) -> tuple[Any, ...]:
    if most is None:
        return samples
    if most < 1:
        raise OmniFP4Error(f"--samples is {most}", hint="1 or more")
    seen: dict[tuple[str, str, bool], int] = {}
    kept = []
    for sample in samples:
        group = (sample.task, sample.modality, sample.speak)
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= most:
            kept.append(sample)
    return tuple(kept)


def _peak_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
