"""A run of the bench: one model, or two of them one after the other on the same machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from omnifp4.benchmark.clock import copy_bandwidth, free_memory
from omnifp4.benchmark.measurement import figures, measure
from omnifp4.benchmark.progress import Steps
from omnifp4.benchmark.settings import Settings
from omnifp4.benchmark.subject import Subject, open_subject
from omnifp4.receipt.base import Verdict, this_environment
from omnifp4.receipt.bench import BenchMachine, BenchReceipt, BenchSettings, Measured, RatioRow
from omnifp4.runtime.devices import find_device


def run_bench(
    subject: Subject,
    settings: Settings,
    *,
    against: Subject | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> BenchReceipt:
    """Measures a model, and a reference after it in the same process.

    Args:
        subject: the model.
        settings: what to measure.
        against: the reference; it is loaded when the memory of the first model is free again.
        on_progress: takes a line for people at each figure.

    Raises:
        OmniFP4Error: a model, device, batch or context that cannot be measured.
    """
    begun = time.monotonic()
    device = find_device(settings.device)
    subjects = [subject] if against is None else [subject, against]
    steps = Steps(len(subjects) * (1 + figures(settings)) + 1, on_progress)
    steps.begin("copy bandwidth")
    bandwidth, copied = copy_bandwidth(device, settings.repeats)
    measured: list[Measured] = []
    for number, one in enumerate(subjects):
        steps.begin(f"load {one.name}")
        measured.append(_measure_one(one, settings, number, bandwidth.median, device, steps))
        free_memory(device)
        if not _passed(measured):
            # Nothing could be compared.
            break
    machine = BenchMachine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        device_bytes=_device_bytes(device),
        cores=os.cpu_count() or 1,
        copy_bytes_per_second=bandwidth,
        copied_bytes=copied,
        torch=torch.__version__,
        transformers=version("transformers"),
        triton=_version_of("triton"),
    )
    reference = measured[1] if len(measured) > 1 else None
    return BenchReceipt(
        passed=_passed(measured),
        machine=machine,
        settings=_record(settings),
        model=measured[0],
        against=reference,
        ratios=tuple(_ratios(measured[0], reference)) if reference is not None else (),
        seconds=time.monotonic() - begun,
        environment=this_environment(),
    )


def _measure_one(
    subject: Subject, settings: Settings, number: int, bytes_per_second: float, device: torch.device, steps: Steps
) -> Measured:
    """In a function of its own, so that nobody holds the model when it returns."""
    loaded = open_subject(subject, parts=settings.parts, seed=settings.seed, device=device)
    engine = settings.against_engine if number else settings.engine
    return measure(
        subject, loaded, settings, engine=engine, bytes_per_second=bytes_per_second, device=device, steps=steps
    )


def _passed(measured: list[Measured]) -> bool:
    return all(check.verdict is Verdict.PASS for one in measured for check in one.checks)


def _ratios(model: Measured, reference: Measured) -> Iterator[RatioRow]:
    """What both have, by the medians."""
    memory = (model.memory.weight_bytes, reference.memory.weight_bytes)
    yield RatioRow(figure="memory of weights, bytes", model=memory[0], reference=memory[1], ratio=memory[1] / memory[0])
    if model.load_seconds and reference.load_seconds:
        yield RatioRow(
            figure="load, seconds", model=model.load_seconds, reference=reference.load_seconds,
            ratio=reference.load_seconds / model.load_seconds,
        )  # fmt: skip
    prompts = {row.prompt_tokens: row.tokens_per_second for row in reference.prefill}
    for row in model.prefill:
        own, other = row.tokens_per_second, prompts.get(row.prompt_tokens)
        if own and other:
            yield _speed_ratio(f"prefill {row.prompt_tokens}, tok/s", own.median, other.median)
    decode = {(row.batch, row.prompt_tokens): row.tokens_per_second for row in reference.decode}
    for line in model.decode:
        own, other = line.tokens_per_second, decode.get((line.batch, line.prompt_tokens))
        if own and other:
            yield _speed_ratio(
                f"decode batch {line.batch} context {line.prompt_tokens}, tok/s", own.median, other.median
            )
    if model.speech and reference.speech and model.speech.real_time_factor and reference.speech.real_time_factor:
        own, other = model.speech.real_time_factor, reference.speech.real_time_factor
        yield RatioRow(
            figure="speech, real-time factor", model=own.median, reference=other.median, ratio=other.median / own.median
        )


def _speed_ratio(figure: str, model: float, reference: float) -> RatioRow:
    return RatioRow(figure=figure, model=model, reference=reference, ratio=model / reference)


def _record(settings: Settings) -> BenchSettings:
    return BenchSettings(
        engine=settings.engine,
        parts=settings.parts,
        prefill=settings.prefill,
        batch=settings.batch,
        context=settings.context,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        cell_seconds=settings.cell_seconds,
        seed=settings.seed,
    )


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
