"""Where FP4 hurts: errors of every layer and expert, and the divergence that each component, layer and expert causes alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from omnifp4.calibration.fingerprint import model_fingerprint
from omnifp4.checkpoint.folder import Checkpoint
from omnifp4.checkpoint.folds import read_folds
from omnifp4.errors import CheckpointError, OmniFP4Error
from omnifp4.evaluation.artifacts import told_recipe
from omnifp4.evaluation.data import limited, read_data
from omnifp4.evaluation.devices import arithmetic_of_device, find_device, name_of_device
from omnifp4.evaluation.distributions import Scores
from omnifp4.evaluation.encoding import EncodedSample, data_digest, encode
from omnifp4.evaluation.fp4_errors import (
    NO_EXPERT,
    ErrorSums,
    Place,
    dequantized_expert,
    expert_matrices,
    fp4_errors,
)
from omnifp4.evaluation.fp4_units import Member, Unit, fp4_members, outside_thinker, units
from omnifp4.evaluation.pair import WEIGHT_ROOM, Pair, free_bytes, open_pair, whole_bytes
from omnifp4.evaluation.results import divergence
from omnifp4.evaluation.run import DTYPES
from omnifp4.evaluation.scoring import ReferenceScores, score_model, score_reference
from omnifp4.evaluation.sides import WholeSide
from omnifp4.evaluation.store import Store, checkpoint_key, content_key
from omnifp4.evaluation.threads import suited_threads
from omnifp4.receipt.base import as_text, package_version, this_environment
from omnifp4.receipt.evaluation import Estimate
from omnifp4.receipt.sensitivity import SENSITIVITY_VERSION, SensitivityReceipt, SensitivityRow
from omnifp4.segments.skeleton import Skeleton

Progress = Callable[[int, int, str], None]
ALL: Final = Unit("", None, ())
"""Stands for everything at once."""


@dataclass(frozen=True, slots=True)
class SensitivitySettings:
    """How to draw the map.

    Attributes:
        data: ``"bundled"`` or a JSONL file.
        samples: use only so many of each task and modality; None uses all.
        alone: run the whole model once for each component and layer; False leaves it at errors, which need no more
            memory than two layers.
        device, dtype: as in `omnifp4.evaluation.run.Settings`.
        cache: folder of what was worked out before, where a killed run goes on; None keeps nothing.
        seed: of the intervals.
        experts: run the model once for each expert too that a token came to; needs `alone`.
    """

    data: str | Path
    samples: int | None
    alone: bool
    device: str
    dtype: str
    cache: Path | None
    seed: int
    experts: bool = False


def run_sensitivity(
    model: Path, against: Path, settings: SensitivitySettings, progress: Progress | None = None
) -> SensitivityReceipt:
    """Draw the map of an artifact against what it was made from.

    Cost: one pass of the wide model layer by layer from disk; with `alone`, ``3 + components + layers`` runs of the whole
    model over all samples, both models in memory, and with `experts` one more for each expert.

    Raises:
        OmniFP4Error: anything about pair, data or memory that is not right, before weights are read.
    """
    begin = time.monotonic()
    if settings.dtype not in DTYPES:
        raise OmniFP4Error(f"dtype is {settings.dtype!r}", hint=f"allowed: {', '.join(DTYPES)}")
    if settings.experts and not settings.alone:
        raise OmniFP4Error(
            "experts were to be run alone, and nothing was to be", hint="leave --segmented or --each-expert out"
        )
    device = find_device(settings.device)
    chosen = limited(read_data(settings.data), settings.samples)
    pair = open_pair(model, against)
    if "quantization_config" not in pair.model.config:
        raise CheckpointError(
            f"{pair.model.location}: is not in FP4, so nothing in it can be sensitive to it",
            hint=f"omnifp4 quantize {against} OUT, then omnifp4 evaluate OUT --against {against} --sensitivity",
        )
    if pair.model.folder is not None and (folds := len(read_folds(pair.model.folder))):
        raise CheckpointError(
            f"{pair.model.location}: {folds} sets of factors were folded into it, so no part of it alone fits the wide model",
            hint="evaluate without --sensitivity tells what it costs as a whole",
        )
    samples = [encode(sample, pair.processor, pair.config) for sample in chosen]
    members = fp4_members(Skeleton(pair.model, dtype=DTYPES[settings.dtype], device=device), pair.model)
    if settings.alone:
        _check_memory(pair, device, DTYPES[settings.dtype])
    run = _Run(pair, samples, members, settings, device, progress or (lambda *_: None))
    with suited_threads(int(pair.config.thinker_config.text_config.hidden_size), device):
        found = run.errors()
        experts = _experts(members, found)
        alone, floor = run.alone(experts if settings.experts else ()) if settings.alone else ({}, None)
    run.forget()
    rows = tuple(_rows(members, found, alone))
    notes = []
    if outside_thinker(pair.model):
        notes.append("talker and code2wav are not in this map: logits of text do not see them")
    if not settings.alone:
        notes.append("nothing was quantized alone, so no part has a divergence of its own")
    elif experts and not settings.experts:
        notes.append(f"no expert was quantized alone: --each-expert runs the model {len(experts):,} more times")
    recipe, rule = told_recipe(pair.model)
    return SensitivityReceipt(
        model=as_text(pair.model.location),
        against=as_text(pair.reference.location),
        model_type=str(pair.reference.config["model_type"]),
        recipe=recipe,
        rule=rule,
        data=as_text(str(settings.data)),
        data_sha256=data_digest(samples),
        samples=len(samples),
        positions=sum(len(sample.positions) for sample in samples),
        dtype=settings.dtype,
        device=name_of_device(device),
        noise_floor=floor,
        together=alone.get(ALL),
        rows=rows,
        notes=tuple(notes),
        seconds=time.monotonic() - begin,
        environment=this_environment(),
        against_fingerprint=model_fingerprint(pair.reference),
    )


def _check_memory(pair: Pair, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a pair that cannot be in memory together: each part in FP4 is put into the wide model."""
    sizes = [whole_bytes(checkpoint, speech=False, dtype=dtype) for checkpoint in (pair.model, pair.reference)]
    free = free_bytes(device)
    if free is not None and sum(sizes) * WEIGHT_ROOM > free:
        model, reference = (f"{size / 1e9:.1f} GB" for size in sizes)
        raise OmniFP4Error(
            f"{pair.model.location} takes {model} and {pair.reference.location} {reference}, both are needed at once, and "
            f"{device} has {free / 1e9:.1f} GB free",
            hint="--segmented tells the errors of every layer and expert from disk, without what each costs alone",
        )


class _Run:
    def __init__(
        self,
        pair: Pair,
        samples: list[EncodedSample],
        members: tuple[Member, ...],
        settings: SensitivitySettings,
        device: Any,
        tell: Progress,
    ) -> None:
        self.pair, self.samples, self.members, self.settings, self.device, self.tell = (
            pair, samples, members, settings, device, tell,
        )  # fmt: skip
        self.parts = {
            "omnifp4": package_version(), "reference": checkpoint_key(pair.reference), "dtype": settings.dtype,
            "device": arithmetic_of_device(device),
        }  # fmt: skip
        self.stores: list[Store] = []
        self.own = self.parts | {"model": checkpoint_key(pair.model), "sensitivity": str(SENSITIVITY_VERSION)}

    def errors(self) -> dict[Place, ErrorSums]:
        """Of weights and outputs."""
        cache = self.settings.cache
        key = content_key("fp4-errors", self.own | {"data": data_digest(self.samples)})
        store = self._store(key)
        return fp4_errors(
            self.pair.model, self.pair.reference, self.members, self.samples, device=self.device,
            dtype=DTYPES[self.settings.dtype], store=store, work=cache / key / "states" if cache else None,
            tell=lambda done, total, item: self.tell(done, total, f"errors, {item}"),
        )  # fmt: skip

    def _store(self, key: str) -> Store:
        self.stores.append(Store(self.settings.cache, key))
        return self.stores[-1]

    def forget(self) -> None:
        """Remove what was kept for a run that goes on: it depends on kernels, which no key knows."""
        for store in self.stores:
            store.remove()

    def alone(self, experts: Sequence[Unit]) -> tuple[dict[Unit, Estimate], float | None]:
        """Divergence of each component, each layer, all together and each of `experts`; and the noise floor."""
        opened: dict[str, Any] = {}

        def loaded(checkpoint: Checkpoint) -> Any:
            if checkpoint.location not in opened:
                from omnifp4.runtime import load

                opened[checkpoint.location] = load(
                    checkpoint.location, device=self.device, dtype=DTYPES[self.settings.dtype], speech=False,
                    progress=lambda done, total, item: self.tell(done, total, f"loading {item}"),
                )  # fmt: skip
            return opened[checkpoint.location]

        wanted = [*units(self.members), ALL, *experts]
        runs = (len(wanted) + 2) * len(self.samples)

        def tell(before: int, name: str) -> Progress:
            return lambda done, total, item: self.tell(before * len(self.samples) + done, runs, f"{name}, {item}")

        store = Store(self.settings.cache, content_key("reference", self.parts))
        reference = score_reference(
            self.samples, lambda: WholeSide(loaded(self.pair.reference)), store, floor=True, tell=tell(0, "reference")
        )
        found = {}
        for number, unit in enumerate(wanted):
            name = _name(unit)
            scores = self._unit(unit, reference, loaded, tell(2 + number, name))
            if not any(one.finite.any() for one in scores):
                raise CheckpointError(f"{self.pair.model.location}: with {name} in FP4 not one logit is finite")
            found[unit] = divergence(reference.own, scores, seed=self.settings.seed).kl_mean
        floor = divergence(reference.own, reference.floor, seed=self.settings.seed).kl_mean.value
        return found, floor

    def _unit(
        self, unit: Unit, reference: ReferenceScores, loaded: Callable[[Checkpoint], Any], tell: Progress
    ) -> list[Scores]:
        members = self.members if unit is ALL else unit.members
        names = "|".join(member.name for member in members)
        name = names if unit.expert is None else f"{names}.{unit.expert}"
        store = self._store(content_key("sensitivity", self.own | {"unit": name}))
        with ExitStack() as swapped:

            def side() -> WholeSide:
                wide, packed = loaded(self.pair.reference), loaded(self.pair.model)
                if unit.expert is None:
                    swapped.enter_context(_swapped(wide, packed, members))
                else:
                    swapped.enter_context(_swapped_expert(wide, packed, members[0], unit.expert))
                return WholeSide(wide)

            return score_model(self.samples, reference, side, store, tell=tell)


@contextmanager
def _swapped(wide: Any, packed: Any, members: Sequence[Member]) -> Iterator[None]:
    """Inside, the wide model has the packed modules of `members`."""
    kept = {member.path: wide.get_submodule(member.path) for member in members}
    try:
        for path in kept:
            wide.set_submodule(path, packed.get_submodule(path))
        yield
    finally:
        for path, module in kept.items():
            wide.set_submodule(path, module)


@contextmanager
def _swapped_expert(wide: Any, packed: Any, member: Member, expert: int) -> Iterator[None]:
    """Inside, one expert of the wide model has the values that its packed weights decode to."""
    matrices = expert_matrices(wide.get_submodule(member.path), expert)
    kept = [matrix.detach().clone() for matrix in matrices]
    try:
        _copy(dequantized_expert(packed.get_submodule(member.path), expert), matrices)
        yield
    finally:
        _copy(kept, matrices)


def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for value, place in zip(values, into, strict=True):
            place.copy_(value)


def _experts(members: Sequence[Member], found: Mapping[Place, ErrorSums]) -> tuple[Unit, ...]:
    """Every expert that a token came to, in the order of layers. Any other changes nothing."""
    by_name = {member.name: member for member in members}
    units_found = [
        Unit(by_name[name].component, by_name[name].layer, (by_name[name],), expert)
        for (name, expert), sums in found.items()
        if expert != NO_EXPERT and sums.tokens
    ]
    return tuple(sorted(units_found, key=lambda unit: (unit.component, unit.layer or 0, unit.expert or 0)))


def _rows(
    members: Sequence[Member], found: Mapping[Place, ErrorSums], alone: Mapping[Unit, Estimate]
) -> Iterator[SensitivityRow]:
    """Components, then layers, then experts."""
    listed = units(tuple(members))
    for level in (True, False):
        chosen = [unit for unit in listed if (unit.layer is None) is level]
        whole = sum(alone[unit].value for unit in chosen if unit in alone)
        for unit in chosen:
            names = {member.name for member in unit.members}
            scheme = "+".join(sorted({member.scheme.value for member in unit.members}))
            sums = _together([found[place] for place in found if place[0] in names])
            yield _row(unit.component, unit.layer, None, sums, alone.get(unit), whole, scheme)
    of_experts = {(unit.members[0].name, unit.expert): estimate for unit, estimate in alone.items() if _is_expert(unit)}
    whole = sum(estimate.value for estimate in of_experts.values())
    place_of = {member.name: member for member in members}
    for (name, expert), sums in sorted(found.items(), key=lambda item: (_layer(place_of[item[0][0]]), item[0][1])):
        if expert != NO_EXPERT:
            place = place_of[name]
            alone_here = of_experts.get((name, expert))
            yield _row(place.component, place.layer, expert, sums, alone_here, whole, place.scheme.value)


def _is_expert(unit: Unit) -> bool:
    return unit.expert is not None


def _row(
    component: str,
    layer: int | None,
    expert: int | None,
    sums: ErrorSums,
    alone: Estimate | None,
    whole: float,
    scheme: str,
) -> SensitivityRow:
    """`whole` is the sum of the divergence over all rows of the same level."""
    return SensitivityRow(
        component=component,
        layer=layer,
        expert=expert,
        linears=sums.linears,
        parameters=sums.parameters,
        weight_error=sums.weight_error / sums.weight_power if sums.weight_power else 0.0,
        output_error=sums.output_error / sums.output_power if sums.output_power else None,
        tokens=sums.tokens,
        kl_mean=alone,
        share=alone.value / whole if alone and whole else None,
        scheme=scheme,
    )


def _together(parts: Sequence[ErrorSums]) -> ErrorSums:
    return ErrorSums(*(sum(getattr(part, item.name) for part in parts) for item in fields(ErrorSums)))


def _layer(member: Member) -> int:
    return -1 if member.layer is None else member.layer


def _name(unit: Unit) -> str:
    if unit is ALL:
        return "everything"
    layer = "" if unit.layer is None else f", layer {unit.layer}"
    return unit.component + layer + ("" if unit.expert is None else f", expert {unit.expert}")
