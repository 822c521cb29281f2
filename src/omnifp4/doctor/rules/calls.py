"""Calls of a model that cannot be called so: no forward at the top, a wrong signature, errors that a loop swallowed."""

from __future__ import annotations

from collections.abc import Iterator

from omnifp4.doctor.evidence import Evidence
from omnifp4.doctor.rules.base import note, problem, told
from omnifp4.receipt.diagnosis import Explanation, Outcome

NO_FORWARD = r"_forward_unimplemented\(\)|missing the required \\?[\"']?forward"
SIGNATURE = r"TypeError: .*(unexpected keyword argument|missing \d+ required|positional arguments? but \d+)"
MOST_FAILED = 0.5

LOOP_FIX = (
    "def forward_loop(_):\n    for inputs in samples:\n        model.thinker(**inputs)   # the top-level model has no forward\n"
    "mtq.quantize(model.thinker, config, forward_loop)\n# and let the loop raise: no `except` around a sample"
)


def _share(evidence: Evidence) -> tuple[int, int]:
    """Failed and all outermost calls: of the calibration, if there was one that called anything."""
    for calibration in evidence.calibrations:
        if calibration["calls"]:
            return calibration["failed"], calibration["calls"]
    return sum(row.failed for row in evidence.calls), sum(row.calls for row in evidence.calls)


def _share_lines(evidence: Evidence) -> list[str]:
    failed, total = _share(evidence)
    if not total:
        printed = evidence.printed(r"(sample|batch|calibrat)\w*.*(failed|error)")
        return [f"the script says {printed[0].count:,} times: {printed[0].message}"] if printed else []
    where = " of the calibration" if evidence.calibrations else ""
    went_on = ", and the script went on" if evidence.outcome is Outcome.ENDED else ""
    return [f"{failed:,} of {total:,} calls{where} failed ({failed / total:.0%}){went_on}"]


def no_forward(evidence: Evidence) -> Iterator[Explanation]:
    """The top-level omni class is called, and has no forward."""
    thrown = evidence.seen(NO_FORWARD)
    if not thrown:
        return
    calibrated = bool(evidence.calibrations) or "calibrat" in thrown[0].whole.lower()
    consequence = (
        ". Calibration saw no sample, so nothing was calibrated, whatever the exit status says" if calibrated else ""
    )
    yield problem(
        "forward.missing",
        "the top-level model was called, and it has no forward",
        "Qwen3OmniMoeForConditionalGeneration has no forward of its own, only generate(): torch's placeholder refuses the "
        "arguments. Quantization has changed no signature: it is so before it, too" + consequence,
        [*told(thrown[0]), *_share_lines(evidence)],
        LOOP_FIX,
    )


def signature(evidence: Evidence) -> Iterator[Explanation]:
    """Arguments that a forward does not take."""
    for thrown in evidence.find(SIGNATURE, "call"):
        if "_forward_unimplemented" in thrown.whole:
            continue
        yield problem(
            "forward.signature",
            f"{thrown.subject}.forward was called with arguments that it does not take",
            "the samples do not fit the signature"
            + (": calibration lost them" if evidence.calibrations else "")
            + "; pass what the processor made, unchanged",
            [*told(thrown), *_share_lines(evidence)],
            'inputs = processor(text=text, return_tensors="pt"); model.thinker(**inputs)',
        )
        return


def loop_arguments(evidence: Evidence) -> Iterator[Explanation]:
    """A calibration loop that takes no model."""
    for thrown in evidence.find(r"takes 0 positional arguments but 1 was given", "calibration", "script"):
        if evidence.calibrations or "forward_loop" in thrown.whole:
            yield problem(
                "calibration.loop-arguments",
                "the forward loop takes no argument, but is given the model",
                "ModelOpt calls forward_loop(model)",
                told(thrown),
                LOOP_FIX,
            )
            return


def swallowed(evidence: Evidence) -> Iterator[Explanation]:
    """Most calls failed, for whatever reason, and the script ended well."""
    failed, total = _share(evidence)
    if (
        evidence.outcome is not Outcome.ENDED
        or not failed
        or evidence.find(NO_FORWARD)
        or evidence.find(SIGNATURE, "call")
    ):
        return
    messages = {text: count for row in evidence.calls for text, count in row.messages.items()}
    text, count = max(messages.items(), key=lambda item: item[1])
    make = problem if evidence.calibrations or failed / total >= MOST_FAILED else note
    yield make(
        "calls.swallowed",
        f"{failed:,} of {total:,} calls of the model failed, and the script ended as if they had not",
        "an except around the call hides what went wrong"
        + (": what was calibrated rests on the other samples alone" if evidence.calibrations else ""),
        [f"{count:,} times: {' '.join(text.split())[:300]}"],
        "let the loop raise, and mend the first error",
    )


def not_calibrated(evidence: Evidence) -> Iterator[Explanation]:
    """A calibration whose loop called no model at all."""
    for calibration in evidence.calibrations:
        if calibration["has_loop"] and not calibration["calls"] and not evidence.find(".", "calibration"):
            printed = evidence.printed(r"(sample|batch|calibrat)\w*.*(failed|error)")
            if printed:
                yield problem(
                    "calibration.nothing-seen",
                    "calibration called no model: every sample failed before",
                    "the loop's own except hides it",
                    [f"{printed[0].count:,} times: {printed[0].message}"],
                    LOOP_FIX,
                )
                return


RULES = (no_forward, signature, loop_arguments, swallowed, not_calibrated)
