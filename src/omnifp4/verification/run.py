"""The proof of an artifact from its files alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from omnifp4.checkpoint.folder import open_checkpoint
from omnifp4.checkpoint.reader import CheckpointReader
from omnifp4.errors import OmniFP4Error
from omnifp4.formats.scheme import Scheme
from omnifp4.models.source import Source, match_source
from omnifp4.receipt.base import Verdict, this_environment
from omnifp4.receipt.verification import Check, TensorError, VerificationReceipt
from omnifp4.verification import claims, coded, completeness, coverage, fake, files, folds, ignoring, scales, taking
from omnifp4.verification.findings import Findings
from omnifp4.verification.reading import Meter, Progress, default_threads
from omnifp4.verification.subject import FAKE_QUANT, Subject, read_subject
from omnifp4.verification.untouched import check_untouched
from omnifp4.verification.values import MOST_WORST, ValueResult, check_values


def verify(
    folder: Path,
    *,
    against: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerificationReceipt:
    """Judge an NVFP4 artifact, whichever tool made it.

    Args:
        folder: the artifact.
        against: the wide checkpoint that it was made from; without it, values cannot be compared.
        threads: to read and compare with; None: one per processor.
        progress: called with bytes done, bytes in all, and what is being read.

    Raises:
        CheckpointError: the folder, or `against`, is not readable as a checkpoint.
        ModelError: the model type is unknown, or its config unusable.
    """
    begin = time.perf_counter()
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise OmniFP4Error(f"threads is {threads}; at least 1 is needed")
    subject = read_subject(folder)
    source = match_source(open_checkpoint(against)) if against is not None else None
    proof = _Proof(subject, source, threads or default_threads(), progress)
    checks = tuple(found.check() for found in proof.checks())
    failed = any(check.verdict is Verdict.FAIL for check in checks)
    return _receipt(subject, against, proof, checks, Verdict.FAIL if failed else Verdict.PASS, begin)


class _Proof:
    """One run of all checks."""

    def __init__(self, subject: Subject, source: Source | None, threads: int, progress: Progress | None) -> None:
        self.subject, self.source, self.threads = subject, source, threads
        self.error: float | None = None
        self.worst: tuple[TensorError, ...] = ()
        self._meter = Meter(progress, _bytes_to_read(subject, source))
        self._wide_on_purpose = subject.is_fake_quant and not subject.quantized and not subject.claims

    def checks(self) -> Iterator[Findings]:
        subject = self.subject
        taken = taking.read_taking(subject)
        complete, sound = completeness.check_tensors(subject)
        if not self._wide_on_purpose:
            yield claims.check_place(subject)
            yield claims.check_scheme(subject)
            if (schemes := taking.check_schemes(subject, taken)) is not None:
                yield schemes
        yield complete
        if not self._wide_on_purpose:
            yield coverage.check_present(subject, taken)
            yield coverage.check_coverage(subject)
            yield coverage.check_ratio(subject, taken)
            yield taking.check_ignore(subject, taken)
            yield ignoring.check_engines(subject, taken)
        speech = files.check_speech(subject)
        if speech is not None:
            yield speech
        with ExitStack() as stack:
            reader = stack.enter_context(CheckpointReader(subject.checkpoint))
            values = scales.read_scales(subject, sound, reader, self.threads, self._meter)
            if self._wide_on_purpose:
                yield fake.check_fake(subject, reader, self.threads, self._meter)
            else:
                yield scales.check_finite(subject, values)
                yield scales.check_plausible(subject, values)
                yield scales.check_shared(subject, values)
                yield scales.check_inputs(subject, values)
                if subject.coded:
                    yield coded.check_coded_scales(subject, sound, reader, self.threads, self._meter)
            yield files.check_shards(subject)
            yield files.check_checksums(subject, reader, self.threads, self._meter)
            wide = self.source.checkpoint if self.source is not None else None
            yield files.check_side_files(subject, wide)
            yield files.check_config(subject, wide)
            if (folded := folds.check_folds(subject)) is not None:
                yield folded
            yield from self._against(sound, values, reader, stack)

    def _against(
        self, sound: set[str], values: scales.ScaleValues, reader: CheckpointReader, stack: ExitStack
    ) -> Iterator[Findings]:
        if self.source is None:
            for name, title in (
                ("values.error", "dequantized weights are near their originals"),
                ("values.untouched", "untouched tensors are bit-identical"),
            ):
                yield Findings(name, title, unchecked="needs --against, the wide checkpoint it was made from")
            return
        readers = (reader, stack.enter_context(CheckpointReader(self.source.checkpoint)))
        rounded: set[str] = set()
        if self._wide_on_purpose:
            rounded.update(*((t.spec.name, t.entry.name) for t in fake.rounded_tensors(self.subject)))
        if self._wide_on_purpose:
            result = fake.check_fake_values(self.subject, self.source, readers, self.threads, self._meter)
        else:
            result = check_values(self.subject, sound, values, self.source, readers, self.threads, self._meter)
        self.error, self.worst = result.error, result.worst
        yield result.findings
        if self.subject.coded:
            others = coded.check_coded_values(self.subject, sound, self.source, readers, self.threads, self._meter)
            self.error, self.worst = _together(result, others)
            yield others.findings
        yield check_untouched(self.subject, rounded, self.source, readers, self.threads, self._meter)


def _together(one: ValueResult, other: ValueResult) -> tuple[float | None, tuple[TensorError, ...]]:
    """The error of both, and the worst of both."""
    worst = sorted((*one.worst, *other.worst), key=lambda tensor: -tensor.relative_squared_error)[:MOST_WORST]
    energy, squared_error = one.energy + other.energy, one.squared_error + other.squared_error
    return (squared_error / energy if energy and math.isfinite(squared_error) else None), tuple(worst)


def _bytes_to_read(subject: Subject, source: Source | None) -> int:
    data = sum(entry.nbytes for entry in subject.checkpoint.tensors.values())
    total = sum(li.block_scale.nbytes for li in subject.fp4.values() if li.block_scale is not None)
    total += sum(li.codes.nbytes for li in subject.coded.values() if li.scheme is Scheme.FP8)
    total += data if files.stored_checksums(subject) is not None else 0
    if source is not None:
        total += data + sum(entry.nbytes for entry in source.checkpoint.tensors.values())
    return total


def _receipt(
    subject: Subject,
    against: Path | None,
    proof: _Proof,
    checks: tuple[Check, ...],
    verdict: Verdict,
    begin: float,
) -> VerificationReceipt:
    dialect = subject.dialect.name if subject.dialect is not None else "none"
    parameters = sum(entry.parameters for entry in subject.checkpoint.tensors.values())
    stored = sum(
        entry.parameters
        for linear in subject.fp4.values()
        for entry in (linear.packed, linear.block_scale, linear.tensor_scale, linear.input_scale)
        if entry is not None
    )
    stored += sum(entry.parameters for linear in subject.coded.values() for entry in linear.entries)
    return VerificationReceipt(
        artifact=str(subject.folder),
        against=str(against) if against is not None else None,
        dialect=FAKE_QUANT if subject.is_fake_quant and not subject.quantized else dialect,
        model_type=subject.layout.model_type,
        activations=subject.activations.value if subject.quantized else "wide",
        verdict=verdict,
        checks=checks,
        fp4_linears=sum(scheme.code_bits == 4 for scheme in subject.quantized.values()),
        schemes=subject.linears_by_scheme,
        fp4_parameters=subject.fp4_parameters,
        wide_parameters=parameters - stored,
        weight_bytes=subject.checkpoint.weight_bytes,
        wide_equivalent_bytes=subject.wide_equivalent_bytes,
        compression_ratio=subject.compression_ratio,
        relative_squared_error=proof.error,
        worst_tensors=proof.worst,
        seconds=time.perf_counter() - begin,
        environment=this_environment(),
    )
