"""One record of everything that is known about one artifact: the receipts of all verbs together."""

from __future__ import annotations

from omnifp4.receipt.base import RECEIPT_VERSION, Environment, Record
from omnifp4.receipt.bench import BenchReceipt
from omnifp4.receipt.calibration import CalibrationReceipt
from omnifp4.receipt.comparison import ComparisonReceipt
from omnifp4.receipt.doctor import DoctorReceipt
from omnifp4.receipt.evaluation import EvaluationReceipt, HarnessReceipt
from omnifp4.receipt.plan import PlanReceipt
from omnifp4.receipt.quantization import QuantizationReceipt
from omnifp4.receipt.sensitivity import SensitivityReceipt
from omnifp4.receipt.server_load import ServerLoadReceipt
from omnifp4.receipt.verification import VerificationReceipt


class GatheredFile(Record):
    """A receipt that was gathered.

    Attributes:
        name: of its file, without folders.
        receipt: its kind.
        sha256: of the file.
    """

    name: str
    receipt: str
    sha256: str


class GatheredReceipt(Record):
    """The record of ``omnifp4 report``. What was not gathered is None or empty: it was not measured.

    Attributes:
        model: the source's folder name or Hub id.
        evaluations: one for each artifact or setting that was compared, in the order they were given.
        harness, benches, server_loads: likewise.
        files: where everything comes from.
        notes: what does not fit together, such as sizes that differ between two receipts.
    """

    receipt: str = "report"
    version: int = RECEIPT_VERSION
    model: str
    model_type: str
    plan: PlanReceipt | None = None
    calibration: CalibrationReceipt | None = None
    quantization: QuantizationReceipt | None = None
    verification: VerificationReceipt | None = None
    evaluations: tuple[EvaluationReceipt, ...] = ()
    comparison: ComparisonReceipt | None = None
    harness: tuple[HarnessReceipt, ...] = ()
    sensitivity: SensitivityReceipt | None = None
    benches: tuple[BenchReceipt, ...] = ()
    server_loads: tuple[ServerLoadReceipt, ...] = ()
    doctor: DoctorReceipt | None = None
    files: tuple[GatheredFile, ...]
    notes: tuple[str, ...]
    environment: Environment

    @property
    def judged(self) -> tuple[EvaluationReceipt, ...]:
        """Every evaluation, those of a comparison among them."""
        return (*self.evaluations, *(self.comparison.evaluations if self.comparison else ()))
