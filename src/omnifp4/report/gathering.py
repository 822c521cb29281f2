"""Receipts of one artifact, from their files into one record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, Final

from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Record, as_text, this_environment
from omnifp4.receipt.bench import BenchReceipt
from omnifp4.receipt.calibration import CalibrationReceipt
from omnifp4.receipt.comparison import ComparisonReceipt
from omnifp4.receipt.doctor import DoctorReceipt
from omnifp4.receipt.evaluation import EvaluationReceipt, HarnessReceipt
from omnifp4.receipt.gathered import GatheredFile, GatheredReceipt
from omnifp4.receipt.plan import PlanReceipt
from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.receipt.sensitivity import SensitivityReceipt
from omnifp4.receipt.server_load import ServerLoadReceipt
from omnifp4.receipt.verification import VerificationReceipt
from omnifp4.report.reading import ReceiptError, read_receipt

ARTIFACT_RECEIPT: Final = "omnifp4.json"
KINDS: Final[dict[str, type[Record]]] = {
    "plan": PlanReceipt,
    "calibration": CalibrationReceipt,
    "quantization": QuantizationReceipt,
    "verification": VerificationReceipt,
    "evaluation": EvaluationReceipt,
    "comparison": ComparisonReceipt,
    "harness": HarnessReceipt,
    "sensitivity": SensitivityReceipt,
    "bench": BenchReceipt,
    "server-load": ServerLoadReceipt,
    "doctor": DoctorReceipt,
    "report": GatheredReceipt,
}
SINGLE: Final[dict[type[Record], str]] = {
    PlanReceipt: "plan",
    CalibrationReceipt: "calibration",
    QuantizationReceipt: "quantization",
    VerificationReceipt: "verification",
    ComparisonReceipt: "comparison",
    SensitivityReceipt: "sensitivity",
    DoctorReceipt: "doctor",
}
"""Kinds of which a report has at most one, and their field."""
SEVERAL: Final[dict[type[Record], str]] = {
    EvaluationReceipt: "evaluations",
    HarnessReceipt: "harness",
    BenchReceipt: "benches",
    ServerLoadReceipt: "server_loads",
}


def gather(paths: Iterable[Path]) -> GatheredReceipt:
    """Read receipts and put them together.

    Args:
        paths: JSON files, gathered receipts among them, or artifact folders, of which omnifp4.json is read.

    Raises:
        ReceiptError: a file cannot be read as a receipt of this version, or two do not belong to one model.
        OmniFP4Error: there is none.
    """
    return gathered([pair for path in paths for pair in read_receipts(path)])


def read_receipts(path: Path) -> list[tuple[GatheredFile, Record]]:
    """The receipt of a file or of an artifact folder with where it comes from; several if it is a gathered one."""
    path = path.expanduser()
    file = path / ARTIFACT_RECEIPT if path.is_dir() else path
    record, sha256 = read_receipt(file, KINDS)
    if isinstance(record, GatheredReceipt):
        return _contents(record, file)
    return [(GatheredFile(name=as_text(file.name), receipt=_kind(record), sha256=sha256), record)]


def gathered(found: Sequence[tuple[GatheredFile, Record]]) -> GatheredReceipt:
    """Put receipts together that are in memory, each with where it comes from.

    Raises:
        ReceiptError: two differ in what there can be one of, or they are not of one model.
        OmniFP4Error: there is none.
    """
    if not found:
        raise OmniFP4Error("no receipt was given", hint="omnifp4 verify OUT --json > verify.json makes one")
    fields: dict[str, Any] = {}
    files: list[GatheredFile] = []
    named: dict[str, str] = {}
    for file, record in found:
        if any(file.sha256 == other.sha256 for other in files):
            continue
        if field := SINGLE.get(type(record)):
            if field in fields:
                raise ReceiptError(
                    f"{file.name}: a second {field} receipt beside {named[field]}; one report tells of one artifact",
                    hint="leave one of them out",
                )
            fields[field], named[field] = record, file.name
        else:
            fields.setdefault(SEVERAL[type(record)], []).append(record)
        files.append(file)
    fields |= {field: tuple(fields.get(field, ())) for field in SEVERAL.values()}
    types = [(file.name, model_type) for file, record in found if (model_type := _model_type(record))]
    for name, model_type in types[1:]:
        if model_type != types[0][1]:
            raise ReceiptError(
                f"{name}: is of a {model_type:.60}, and {types[0][0]} of a {types[0][1]:.60}",
                hint="give the receipts of one model",
            )
    result = GatheredReceipt(
        model=_model_name([record for _, record in found]),
        model_type=types[0][1] if types else "",
        files=tuple(files),
        notes=(),
        environment=this_environment(),
        **fields,
    )
    return result.model_copy(update={"notes": tuple(_disagreements(result))})


def folder_name(path: str) -> str:
    """The last part of a path or Hub id: where something lies on a disk is nobody's business."""
    return PurePath(path.replace("\\", "/")).name or path


def _contents(record: GatheredReceipt, path: Path) -> list[tuple[GatheredFile, Record]]:
    """What a gathered receipt was made of; its files stand in the order in which they were given."""
    waiting: dict[str, list[Record]] = {}
    for kind, cls in KINDS.items():
        field = SINGLE.get(cls) or SEVERAL.get(cls)
        held = getattr(record, field) if field else None
        waiting[kind] = list(held) if isinstance(held, tuple) else [held] if held is not None else []
    pairs = [(file, waiting[file.receipt].pop(0)) for file in record.files if waiting.get(file.receipt)]
    if len(pairs) != len(record.files) or any(waiting.values()):
        raise ReceiptError(
            f"{as_text(str(path))}: field files: does not name what the gathered receipt holds",
            hint="gather the receipts again",
        )
    return pairs


def _kind(record: Record) -> str:
    return str(getattr(record, "receipt", type(record).__name__))


def _model_type(record: Record) -> str:
    if isinstance(record, QuantizationReceipt):
        return record.source.model_type
    if isinstance(record, DoctorReceipt):
        return record.checkpoint.model_type if record.checkpoint else ""
    return str(getattr(record, "model_type", ""))


def _model_name(records: Sequence[Record]) -> str:
    """The source's name: the quantization and the plan know it, the others know a folder."""
    for record in records:
        if isinstance(record, QuantizationReceipt):
            return record.source.model
    for kind in (PlanReceipt, SensitivityReceipt, EvaluationReceipt, ComparisonReceipt):
        for record in records:
            if isinstance(record, kind):
                model = str(getattr(record, "against", None) or getattr(record, "model", ""))
                return model if model.count("/") == 1 and not model.startswith((".", "/", "~")) else folder_name(model)
    for record in records:
        name = getattr(record, "artifact", None) or getattr(record, "model", None)
        if name:
            return folder_name(str(name))
    return "no model"


def _disagreements(gathered: GatheredReceipt) -> list[str]:
    """Figures that should be equal in two receipts and are not."""
    notes = []
    made, plan, proof = gathered.quantization, gathered.plan, gathered.verification
    if made and plan and made.weight_bytes != plan.weight_bytes_after:
        notes.append(
            f"the plan tells {plan.weight_bytes_after:,} bytes of weights and quantize wrote {made.weight_bytes:,}: "
            "they are of different recipes, formats or sources"
        )
    if made and proof and made.weight_bytes != proof.weight_bytes and not made.changes:
        notes.append(
            f"quantize wrote {made.weight_bytes:,} bytes of weights and verify found {proof.weight_bytes:,}: "
            "they are of different artifacts"
        )
    data = {item.data_sha256: item.model for item in gathered.judged}
    if len(data) > 1:
        artifacts = " and ".join(map(folder_name, list(data.values())[:2]))
        notes.append(f"{artifacts} were evaluated on different samples: their figures cannot be compared")
    return notes
