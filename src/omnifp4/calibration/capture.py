"""`calibrate`: statistics of every linear's inputs, collected layer by layer, written when all is whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from omnifp4.calibration.fingerprint import model_fingerprint
from omnifp4.calibration.gradients import collect_gradients
from omnifp4.calibration.preparation import Preparation, Progress, layer_count, prepare
from omnifp4.calibration.record import calibration_receipt, components, expert_tokens
from omnifp4.calibration.running import run_layers
from omnifp4.calibration.speech import capture_speech, states_layer, why_not
from omnifp4.calibration.statistics import ALL_EXPERT, expert_bank
from omnifp4.calibration.sums import Collector, routed_tokens
from omnifp4.calibration.writing import assemble, checksums, read_part, write_part
from omnifp4.checkpoint.staging import Staging, refuse_existing
from omnifp4.errors import OmniFP4Error
from omnifp4.models.base import Kind, Part
from omnifp4.receipt.calibration import STATISTICS_VERSION, CalibrationReceipt, ExpertTokens, SampleFailure
from omnifp4.segments.gradients import refuse_without_head
from omnifp4.segments.states import restart_if_ahead

LEAST_TOKENS: Final = 64
"""Four times the 16 inputs of a block: fewer make a Hessian of noise."""
ALL_EXPERT_TOKENS: Final = 2048
MAX_FAILED: Final = 0.05
TOWERS_UNIT: Final = "towers"
HEAD_UNIT: Final = "head"
SPEECH_UNIT: Final = "speech"
GRADIENTS_UNIT: Final = "gradients"
STATES_UNIT: Final = "spoken states"
"""What the talker will read of the thinker; not in the file."""


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """How to calibrate.

    Attributes:
        samples: of the set; None takes all, and 60 of the bundled.
        seed: of the choice of samples.
        device, dtype: of the arithmetic.
        max_failed: share of samples that may fail.
        least_tokens: an expert with fewer routed tokens takes the all-expert statistics.
        all_expert_tokens: that every expert gets beside; 0 collects routed statistics only.
        block_hessians: collect products within blocks of 16 inputs: sixteen times the size.
        speech: capture talker and code predictor: None where it can be done.
        gradients: squared gradients of the thinker's weights too.
        resume: go on with what an interrupted run left.
    """

    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "bfloat16"
    max_failed: float = MAX_FAILED
    least_tokens: int = LEAST_TOKENS
    all_expert_tokens: int = ALL_EXPERT_TOKENS
    block_hessians: bool = True
    speech: bool | None = None
    gradients: bool = False
    resume: bool = False


def run_capture(
    model: str | Path, out: Path, data: str | Path, settings: CaptureSettings, progress: Progress
) -> CalibrationReceipt:
    """Write the statistics file `out`.

    Args:
        model: folder of a wide checkpoint.
        out: must not exist; appears when it is whole.
        data: a set, a JSONL file, or ``bundled``.
        settings: how.
        progress: called with work done, work in all, and what it is; once for each stage.

    Raises:
        OmniFP4Error: an argument, model, set or disk is not right.
        CalibrationFailed: too many samples failed; OUT does not appear.
    """
    refuse_existing(out)
    for name, value, least in (
        ("--least-tokens", settings.least_tokens, 1),
        ("--all-expert-tokens", settings.all_expert_tokens, 0),
    ):
        if value < least:
            raise OmniFP4Error(f"{name} is {value}", hint=f"{least} or more")
    prepared = prepare(
        model, data, samples=settings.samples, seed=settings.seed, device=settings.device, dtype=settings.dtype,
        max_failed=settings.max_failed, progress=lambda done, total, item: progress(done, total, f"reading {item}"),
    )  # fmt: skip
    return capture(prepared, out, settings, progress)


def capture(prepared: Preparation, out: Path, settings: CaptureSettings, progress: Progress) -> CalibrationReceipt:
    """As `run_capture`, of a model and sequences that are prepared already."""
    begin = time.monotonic()
    silent = why_not(prepared, settings.speech)
    if settings.gradients:
        refuse_without_head(prepared.checkpoint)
    fingerprint = model_fingerprint(prepared.checkpoint)
    job = {
        "verb": "calibrate", "version": STATISTICS_VERSION, "model": fingerprint, "data": prepared.data_sha256,
        "dtype": str(prepared.dtype), "device": prepared.device.type, "all_expert_tokens": settings.all_expert_tokens,
        "block_hessians": settings.block_hessians,
    }  # fmt: skip
    if settings.gradients:
        job["gradients"] = settings.seed
    with Staging(out, job, resume=settings.resume) as staging:
        for unit in staging.finished:
            # What was damaged meanwhile is told before hours of work, not when the file is made of it.
            read_part(staging, unit)
        run = _Capture(prepared, settings, staging, progress)
        if not silent and run.began_without_speech:
            silent = "the run that is continued was begun without speech"
            if settings.speech:
                raise OmniFP4Error(
                    f"--speech was asked for: {silent}", hint=f"remove {staging.folder}, or leave --speech out"
                )
        resumed = run.layers(spoken=not silent)
        if not silent:
            run.speech()
        if settings.gradients:
            run.gradients()
        receipt = run.receipt(silent, resumed, begin)
        assemble(staging, run.units, receipt, run.weights, run.experts)
    return receipt


class _Capture:
    """One run: units of work are layers, and the speech after them."""

    def __init__(self, prepared: Preparation, settings: CaptureSettings, staging: Staging, tell: Progress) -> None:
        self.prepared, self.settings, self.staging, self.tell = prepared, settings, staging, tell
        self.units: list[str] = []
        self._collector: Collector | None = None
        self._towers: Collector | None = None
        self._head = Collector(blocks=settings.block_hessians, all_expert_tokens=0)
        self._heads: tuple[str, ...] = ()
        self._states_layer: int | None = None
        self._spoken = {number: one for number, one in enumerate(prepared.sequences) if one.sample.speak}
        self._states: dict[str, Tensor] = {}
        tokens = sum(int(one.tensors["input_ids"].shape[1]) for one in prepared.sequences)
        self._stride = max(1, tokens // max(1, settings.all_expert_tokens))

    def layers(self, *, spoken: bool) -> int:
        """Run towers, decoder layers and last norm; returns how many layers an earlier run had done.

        With `spoken`, the states that the talker reads are kept.
        """
        self._recall()
        work = self.staging.folder / "states"
        restart_if_ahead(work, next(number for number in count() if f"layer {number}" not in self.staging.finished))
        if spoken and STATES_UNIT not in self.staging.finished:
            self._states_layer = states_layer(self.prepared)
        if HEAD_UNIT not in self.staging.finished:
            self._heads = tuple(
                name
                for name, spec in self.prepared.linears.items()
                if spec.component.part is Part.THINKER and spec.component.kind is Kind.HEAD
            )
        at_the_end = self._states_layer == layer_count(self.prepared.checkpoint)
        run = run_layers(
            self.prepared, on_layer=self._visit, on_layer_done=self._layer_done,
            on_tower=None if TOWERS_UNIT in self.staging.finished else self._tower,
            on_final=self._final if self._heads or at_the_end else None,
            work=work, progress=self.tell,
        )  # fmt: skip
        if at_the_end:
            self._write_spoken()
        if self._heads:
            self._head.finish()
            self._write(HEAD_UNIT, self._head)
        layers = [f"layer {number}" for number in range(run.layers)]
        self.units = [unit for unit in (TOWERS_UNIT, *layers, HEAD_UNIT) if unit in self.staging.finished]
        return run.resumed_after

    @property
    def began_without_speech(self) -> bool:
        """An earlier run has passed the layer whose states would be spoken, and kept none."""
        # What comes of the last norm is no layer's, and is made in every run.
        passed = f"layer {states_layer(self.prepared)}"
        return passed in self.staging.finished and STATES_UNIT not in self.staging.finished

    def speech(self) -> None:
        """Speak, unless an earlier run has."""
        self.units.append(SPEECH_UNIT)
        if SPEECH_UNIT not in self.staging.finished:
            collector = self._new_collector(stride=1)
            states = read_part(self.staging, STATES_UNIT)
            capture_speech(self.prepared, states, collector, self.tell)
            self._write(SPEECH_UNIT, collector)

    def gradients(self) -> None:
        """Collect squared gradients, unless an earlier run has. What is interrupted here begins anew."""
        self.units.append(GRADIENTS_UNIT)
        if GRADIENTS_UNIT not in self.staging.finished:
            found, positions = collect_gradients(self.prepared, seed=self.settings.seed, progress=self.tell)
            more = {"weights": {}, "experts": {}, "failures": [], "positions": positions}
            write_part(self.staging, GRADIENTS_UNIT, found, more)

    @property
    def weights(self) -> dict[str, str]:
        """Banks of plain linears."""
        return self._gathered("weights")

    @property
    def experts(self) -> dict[str, int]:
        """Numbers of experts."""
        return self._gathered("experts")

    def receipt(self, silent: str, resumed: int, begin: float) -> CalibrationReceipt:
        """The record of the whole."""
        captured, missing = components(self.prepared, self.weights, self.experts, silent=silent)
        return calibration_receipt(
            self.prepared,
            least_tokens=self.settings.least_tokens,
            experts=tuple(self._expert_tokens(name) for name in self.experts),
            captured=captured,
            missing=missing,
            block_hessians=self.settings.block_hessians,
            tensors=checksums(self.staging, self.units),
            resumed=resumed,
            begin=begin,
            gradient_positions=self.staging.finished[GRADIENTS_UNIT]["positions"] if self.settings.gradients else 0,
        )

    def _visit(self, visit: Any) -> None:
        if self._collector is None:
            self._collector = self._new_collector(self._stride)
        for name in visit.inputs:
            if name.endswith(".experts"):
                chosen = visit.routing.experts
                self._collector.add_experts(name, visit.modules[name], visit.inputs[name], chosen)
        self._add_linears(self._collector, visit.inputs)
        if visit.layer == self._states_layer:
            self._keep_spoken(visit.sample, visit.given[0])

    def _final(self, sample: int, states: Tensor) -> None:
        if self._heads:
            self._head.add_linear("head", self._heads, states)
        if self._states_layer is not None and STATES_UNIT not in self.staging.finished:
            self._keep_spoken(sample, states)

    def _keep_spoken(self, sample: int, states: Tensor) -> None:
        if sequence := self._spoken.get(sample):
            self._states[sequence.sample.name] = states[: sequence.prompt_tokens].float().cpu()

    def _write_spoken(self) -> None:
        write_part(self.staging, STATES_UNIT, self._states, {"weights": {}, "experts": {}, "failures": []})
        self._states = {}

    def _add_linears(self, collector: Collector, inputs: Mapping[str, Tensor]) -> None:
        shared: dict[str, list[str]] = {}
        for name in inputs:
            if f"{name}.weight" in self.prepared.linears:
                shared.setdefault(self.prepared.bank(f"{name}.weight"), []).append(name)
        for bank, names in shared.items():
            collector.add_linear(bank, tuple(f"{name}.weight" for name in names), inputs[names[0]])

    def _tower(self, _: int, __: str, inputs: Mapping[str, Tensor]) -> None:
        if self._towers is None:
            self._towers = self._new_collector(stride=1)
        self._add_linears(self._towers, inputs)

    def _layer_done(self, layer: int) -> bool:
        assert self._collector is not None
        if self._towers is not None:
            self._towers.finish()
            self._write(TOWERS_UNIT, self._towers)
            self._towers = None
        if layer == self._states_layer:
            self._write_spoken()
        self._collector.finish()
        self._write(f"layer {layer}", self._collector)
        self._collector = None
        return False

    def _new_collector(self, stride: int) -> Collector:
        settings = self.settings
        return Collector(blocks=settings.block_hessians, all_expert_tokens=settings.all_expert_tokens, stride=stride)

    def _write(self, unit: str, collector: Collector) -> None:
        failures = [one.model_dump(mode="json") for one in self.prepared.failures.found]
        tokens = {name: routed_tokens(collector.tensors, name) for name in collector.experts}
        helped = {name: _all_expert(collector.tensors, name) for name in collector.experts}
        more = {
            "weights": collector.weights, "experts": collector.experts, "tokens": tokens, "all_expert": helped,
            "failures": failures,
        }  # fmt: skip
        write_part(self.staging, unit, collector.tensors, more)

    def _recall(self) -> None:
        """Samples that failed in an earlier run are not tried again."""
        failures = self.prepared.failures
        for record in self.staging.finished.values():
            for one in map(SampleFailure.model_validate, record["failures"]):
                if one.sample not in failures.names:
                    failures.found.append(one)
        failures.check()

    def _gathered(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for unit in self.units:
            found |= self.staging.finished[unit][key]
        return found

    def _expert_tokens(self, name: str) -> ExpertTokens:
        record = next(record for record in self.staging.finished.values() if name in record["experts"])
        return expert_tokens(name, record["tokens"][name], record["all_expert"][name], self.settings.least_tokens)


def _all_expert(tensors: Mapping[str, Any], name: str) -> list[int]:
    """Tokens of the all-expert statistics of each expert; empty without them."""
    counts = tensors.get(f"{expert_bank(name, 'down_proj')}.{ALL_EXPERT}.tokens")
    return [] if counts is None else counts.tolist()
