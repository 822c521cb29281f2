"""Running the units of a job that looks at inputs: layer by layer beside a calibration set, or from a statistics file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnifp4.checkpoint.dialects import Activations
from omnifp4.checkpoint.staging import Staging
from omnifp4.checkpoint.units import Progress, work_through
from omnifp4.errors import RecipeError
from omnifp4.formats.scheme import Scheme
from omnifp4.models.base import Part
from omnifp4.quantization.calibrated import FOLD_UNIT, CalibratedWorker
from omnifp4.quantization.decisions import CopyUnit, EncodeUnit, FusedUnit, Job, Unit
from omnifp4.quantization.folding import FoldPlace, find_fold, fold_places
from omnifp4.quantization.inputs import FileInputs, KnownInputs, VisitedInputs
from omnifp4.quantization.method import Auto, Awq, Need, SignRound

if TYPE_CHECKING:
    from omnifp4.calibration.hessians import LayerInputs
    from omnifp4.calibration.statistics import Statistics
    from omnifp4.receipt.calibration import CalibrationReceipt
    from omnifp4.receipt.sensitivity import SensitivityReceipt


@dataclass(frozen=True)
class Calibration:
    """What is there to look at inputs with.

    Attributes:
        statistics: an open file; None: none.
        data: a calibration set to be run through the model; None: none.
        device, dtype: of that run.
        sensitivity: the map that a budget chose by; None: none.
    """

    statistics: Statistics | None = None
    data: str | Path | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    sensitivity: SensitivityReceipt | None = None

    @property
    def sensitivity_sha256(self) -> str:
        """Of the map; empty where there is none."""
        if self.sensitivity is None:
            return ""
        return hashlib.sha256(self.sensitivity.model_dump_json().encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What decides the bytes that are written."""
        receipt = self.statistics.receipt if self.statistics is not None else None
        return {
            "statistics": sorted(receipt.tensors.items()) if receipt is not None else None,
            "data": None if self.data is None else _data_identity(str(self.data)),
            "device": None if self.data is None else self.device,
            "dtype": None if self.data is None else self.dtype,
            "sensitivity": self.sensitivity_sha256,
        }


def _data_identity(data: str) -> list[Any]:
    path = Path(data)
    if not path.exists():
        return [data]
    file = path / "dataset.json" if path.is_dir() else path
    status = file.stat() if file.exists() else path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def check_calibration(job: Job, calibration: Calibration) -> None:
    """Refuse a recipe that lacks what it needs, or has no use for what is given, before anything is written.

    Raises:
        RecipeError: with what to add.
    """
    recipe, need = job.recipe, job.recipe.need
    if need is Need.NOTHING:
        if calibration.statistics is not None or calibration.data is not None:
            raise RecipeError(
                f"recipe {recipe.name!r} looks at no inputs, so statistics and data have no use",
                hint="leave them out, or choose --rule importance or another recipe",
            )
        return
    if need is Need.HESSIANS and calibration.data is None:
        raise RecipeError(
            f"recipe {recipe.name!r} needs to see inputs, which no statistics file can hold",
            hint="add --data SET; omnifp4 dataset SET makes one",
        )
    if calibration.statistics is None and calibration.data is None:
        raise RecipeError(
            f"recipe {recipe.name!r} with rule {job.rule_name} needs to know the inputs",
            hint="add --statistics FILE (omnifp4 calibrate MODEL FILE --data SET) or --data SET",
        )
    if isinstance(recipe.method, Auto) and calibration.statistics is None:
        raise RecipeError(
            f"recipe {recipe.name!r} chooses by what a statistics file tells before anything is written",
            hint="add --statistics FILE; omnifp4 calibrate MODEL FILE --data SET makes one",
        )
    if recipe.activations is Activations.FP4:
        _check_input_scales(job, calibration)
    if isinstance(recipe.method, Awq) and not fold_places(job.decisions):
        raise RecipeError(
            f"recipe {recipe.name!r}: no layer of this {job.source.layout.model_type} has channels that can be scaled",
            hint="choose another recipe",
        )


def _check_input_scales(job: Job, calibration: Calibration) -> None:
    """Linears outside the thinker are not seen by a run; only a file can know them."""
    file = calibration.statistics
    for decision in job.quantized:
        if decision.scheme is not Scheme.NVFP4:
            continue
        name, part = decision.spec.name, decision.spec.component.part
        seen = calibration.data is not None and part is Part.THINKER
        expert = ".experts." in name
        if not seen and not expert and (file is None or file.source(name) == "none"):
            raise RecipeError(
                f"{name}: nothing is known of its inputs, and W4A4 needs an input scale for every linear",
                hint=f"leave it wide: --component {decision.spec.component.name}=bf16",
            )


def run_calibrated(
    job: Job,
    staging: Staging,
    worker: CalibratedWorker,
    calibration: Calibration,
    threads: int,
    progress: Progress | None,
) -> CalibrationReceipt | None:
    """Do every unit that the journal does not have.

    Returns:
        The receipt of the run over the calibration set, or of the statistics file.
    """
    for name, record in staging.finished.items():
        if name.startswith(FOLD_UNIT):
            worker.take_fold(record)
    places = fold_places(job.decisions) if isinstance(job.recipe.method, Awq) else {}
    file = FileInputs(calibration.statistics) if calibration.statistics is not None else None
    if calibration.data is None:
        assert calibration.statistics is not None and file is not None
        worker.inputs = file
        for layer in places.values():
            _find_folds(layer, job, staging, worker, file)
        work_through(job.units, staging, worker.run, threads, progress)
        return calibration.statistics.receipt
    receipt = _visit(job, staging, worker, calibration, places, progress)
    worker.inputs = file
    work_through(job.units, staging, worker.run, threads, progress)
    return receipt


def _visit(
    job: Job,
    staging: Staging,
    worker: CalibratedWorker,
    calibration: Calibration,
    places: dict[str, list[FoldPlace]],
    progress: Progress | None,
) -> CalibrationReceipt:
    from omnifp4.calibration.hessians import visit_layers

    folder = job.source.checkpoint.folder
    assert folder is not None and calibration.data is not None
    total = sum(unit.nbytes for unit in job.units)
    layers: dict[str, list[Unit]] = {}
    runs = isinstance(job.recipe.method, SignRound) and job.recipe.method.against == "layer"

    def visitor(name: str, layer: LayerInputs) -> None:
        units = layers[name] = _units_of(job.units, name)
        waiting = [unit for unit in units if unit.name not in staging.finished]
        if not waiting:
            return
        worker.inputs = inputs = VisitedInputs(layer)
        _find_folds(places.get(name, []), job, staging, worker, inputs)
        done = sum(unit.nbytes for unit in job.units if unit.name in staging.finished)
        if runs:
            steps = f"{name}: rounding of its linears together"
            _learn(
                units,
                job,
                worker,
                inputs,
                layer,
                lambda step: progress and progress(done, total, f"{steps}, step {step}"),
            )
        # One at a time: the arithmetic inside is parallel, and a layer's Hessians are made one by one.
        work_through(waiting, staging, worker.run, 1, _after(progress, done, total))

    def on_run(done: int, of: int, what: str) -> None:
        if progress:
            finished = sum(unit.nbytes for unit in job.units if unit.name in staging.finished)
            progress(finished, total, f"calibration run: {what}")

    return visit_layers(
        folder,
        calibration.data,
        visitor,
        device=calibration.device,
        dtype=calibration.dtype,
        runs=runs,
        progress=on_run,
    )


def _learn(
    units: Sequence[Unit],
    job: Job,
    worker: CalibratedWorker,
    inputs: VisitedInputs,
    layer: LayerInputs,
    tell: Callable[[int], object],
) -> None:
    """Learn the rounding of a layer's NVFP4 linears together; where there is no memory for it, each is learned by itself."""
    from omnifp4.quantization.layer_rounding import fits, round_layer

    assert isinstance(job.recipe.method, SignRound)
    groups = [
        worker.subjects(tensors)
        for unit in units
        if not isinstance(unit, CopyUnit) and unit.scheme is Scheme.NVFP4
        for tensors in ([unit.tensors] if isinstance(unit, EncodeUnit) else unit.experts)
    ]
    if fits(groups, inputs.device):
        inputs.codes = round_layer(
            groups, job.recipe, job.rule, inputs, layer, steps=job.recipe.method.steps, tell=tell
        )


def _units_of(units: Sequence[Unit], layer: str) -> list[Unit]:
    """Encode units of one layer; copies wait until all folds are known."""
    prefix = f"{layer}."
    found: list[Unit] = []
    for unit in units:
        if isinstance(unit, CopyUnit):
            continue
        first = unit.tensors[0] if isinstance(unit, EncodeUnit) else _first(unit)
        if first.spec.name.startswith(prefix):
            found.append(unit)
    return found


def _first(unit: FusedUnit) -> Any:
    return unit.experts[0][0]


def _after(progress: Progress | None, done: int, total: int) -> Callable[[int, int, str], None] | None:
    if progress is None:
        return None

    def shifted(own: int, _: int, what: str) -> None:
        progress(min(total, done + own), total, what)

    return shifted


def _find_folds(
    places: Sequence[FoldPlace], job: Job, staging: Staging, worker: CalibratedWorker, inputs: KnownInputs
) -> None:
    """Find the factors of a layer, and remember them: the weights of a run that goes on must fit those already written."""
    for place in places:
        unit = FOLD_UNIT + place.origin.spec.name
        if unit in staging.finished:
            continue
        fold = find_fold(place, worker.reader, inputs, job.recipe, job.rule)
        record = {"crc": {}, "fold": None if fold is None else fold.to_json()}
        staging.record(unit, record)
        worker.take_fold(record)
