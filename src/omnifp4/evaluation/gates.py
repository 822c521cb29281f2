"""Limits that a build server sets: each meets the worst figure it applies to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from omnifp4.errors import OmniFP4Error
from omnifp4.receipt.base import Verdict
from omnifp4.receipt.evaluation import Gate, ModalityResult, SpeechResult, TaskResult


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits; None sets none.

    Attributes:
        max_kl: of the mean divergence in any modality, nats.
        min_top1: of the top-1 agreement in any modality, 0 to 1.
        max_ppl_ratio: of the ratio of perplexities in any modality.
        min_accuracy: of the model's right answers in any task, 0 to 1.
        max_accuracy_loss: of right answers lost against the reference in any task, 0 to 1.
        min_code_agreement: of speech codes, free-running, 0 to 1.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    min_accuracy: float | None = None
    max_accuracy_loss: float | None = None
    min_code_agreement: float | None = None

    def check(self) -> None:
        """Refuse a limit that means nothing.

        Raises:
            OmniFP4Error: naming the option and its range.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            most = float("inf") if field.name in ("max_kl", "max_ppl_ratio") else 1.0
            if value is not None and not 0 <= value <= most:
                allowed = "0 or more" if most > 1 else "0 to 1"
                raise OmniFP4Error(f"{option(field.name)} is {value}", hint=f"allowed: {allowed}")

    @property
    def is_empty(self) -> bool:
        """No limit is set."""
        return not any(getattr(self, field.name) is not None for field in fields(self))

    def check_data(self, *, tasks: bool, digits: bool, speech: bool) -> None:
        """Refuse a limit that will have nothing to judge, before anything is run.

        Args:
            tasks: the data has tasks.
            digits: single digits are spoken, which count as a task too.
            speech: something is spoken.

        Raises:
            OmniFP4Error: naming the option.
        """
        there = {"min_accuracy": tasks or digits, "max_accuracy_loss": tasks or digits, "min_code_agreement": speech}
        for name, something in there.items():
            if getattr(self, name) is not None and not something:
                raise OmniFP4Error(
                    f"{option(name)} has nothing to judge",
                    hint="nothing is spoken" if name == "min_code_agreement" else "give samples a task and an answer",
                )


def option(name: str) -> str:
    """The command line's name of a limit."""
    return "--" + name.replace("_", "-")


def judge(
    limits: Limits,
    modalities: Iterable[ModalityResult],
    tasks: Iterable[TaskResult],
    speech: SpeechResult | None,
) -> tuple[Gate, ...]:
    """Every limit that is set, with what it met; and, set or not, that everything the model gave is finite.

    Spoken digits that are understood count as right answers of a task.
    """
    modalities, tasks = tuple(modalities), tuple(tasks)
    accuracies = [(one.model, one.reference, one.task) for one in tasks]
    if speech is not None and (heard := speech.recognition) is not None:
        accuracies.append((heard.model, heard.reference, "speech understood"))
    figures: dict[str, list[tuple[float, str]]] = {
        "max_kl": [(one.model.kl_mean.value, one.modality) for one in modalities],
        "min_top1": [(one.model.top1_agreement.value, one.modality) for one in modalities],
        "max_ppl_ratio": [(one.model.perplexity_ratio.value, one.modality) for one in modalities],
        "min_accuracy": [(model, task) for model, _, task in accuracies],
        "max_accuracy_loss": [(reference - model, task) for model, reference, task in accuracies],
        "min_code_agreement": [(speech.code_agreement.value, "speech")] if speech is not None else [],
    }
    bad = [
        Gate(option=f"non-finite {what}", limit=0, value=count, where=where, verdict=Verdict.FAIL)
        for what, count, where in (
            *(("positions", one.model.non_finite, one.modality) for one in modalities),
            *((("utterances", speech.non_finite, "speech"),) if speech is not None else ()),
        )
        if count
    ]
    return (*bad, *_gates(limits, figures))


def _gates(limits: Limits, figures: dict[str, list[tuple[float, str]]]) -> Iterator[Gate]:
    for name, found in figures.items():
        limit = getattr(limits, name)
        if limit is None:
            continue
        value, where = (max if name.startswith("max") else min)(found)
        # A difference of two shares is known to about 16 digits only.
        kept = value <= limit + 1e-12 if name.startswith("max") else value >= limit - 1e-12
        yield Gate(
            option=option(name), limit=limit, value=value, where=where, verdict=Verdict.PASS if kept else Verdict.FAIL
        )
