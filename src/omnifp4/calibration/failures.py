"""Samples that failed: counted, told, and too many of them end the run, so that no failure looks like success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from omnifp4.calibration.encoding import told
from omnifp4.errors import OmniFP4Error, ProofError
from omnifp4.receipt.calibration import Cause, SampleFailure


class CalibrationFailed(ProofError):
    """Too many samples failed: exit status 1, and OUT does not appear."""


ADVICE = {
    Cause.MEDIA: "omnifp4 dataset OUT --from FILE checks media before they are used",
    Cause.PROMPT: "compare the processor's files with the released model's: omnifp4 doctor MODEL",
    Cause.FORWARD: "the model's forward does not take these inputs: omnifp4 doctor MODEL",
    Cause.NUMBERS: "the weights are damaged or the dtype is too narrow: try --dtype float32",
}


class Failures:
    """Of one run."""

    def __init__(self, samples: int, most_share: float, known: Iterable[SampleFailure] = ()) -> None:
        """Args:
            samples: in all.
            most_share: of them that may fail, 0 to 1.
            known: of an earlier run of the same.

        Raises:
            OmniFP4Error: `most_share` is no share.
        """
        if not 0 <= most_share <= 1:
            raise OmniFP4Error(f"--max-failed is {most_share:g}", hint="a share from 0 to 1, such as 0.05")
        self.samples, self.most_share = samples, most_share
        self.found: list[SampleFailure] = list(known)

    @property
    def names(self) -> frozenset[str]:
        """Of the samples."""
        return frozenset(one.sample for one in self.found)

    def add(self, sample: str, cause: Cause, error: Exception, layer: int | None = None) -> None:
        """Remember a failure; `check` tells whether there are too many."""
        self.found.append(SampleFailure(sample=sample, cause=cause, layer=layer, error=told(error)))

    def check(self) -> None:
        """Raise CalibrationFailed if more failed than may, or all did; the message names causes and the first error."""
        count = len(self.found)
        if count <= self.most_share * self.samples and count < self.samples:
            return
        causes = Counter(one.cause for one in self.found)
        shares = ", ".join(f"{cause.value}: {number}" for cause, number in causes.most_common())
        first = self.found[0]
        named = first.layer is None or first.error.startswith(f"layer {first.layer}: ")
        where = "" if named else f", layer {first.layer}"
        raise CalibrationFailed(
            f"{count} of {self.samples} samples failed ({shares}), and at most {self.most_share:.0%} may; nothing "
            f"whole is written; the first was {first.sample!r}{where}: {first.error}",
            hint=ADVICE[causes.most_common(1)[0][0]],
        )
