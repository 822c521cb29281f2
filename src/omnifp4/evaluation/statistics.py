"""Figures of many samples, with confidence intervals from paired data.

Positions of one sample are not independent, so whole samples are drawn, with replacement and with the same draws for
every figure of a comparison. Changes of shares have an interval of their own.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from omnifp4.evaluation.distributions import Floats
from omnifp4.receipt.evaluation import Estimate

RESAMPLES: Final = 2_000
PERCENTILES: Final = (2.5, 97.5)
NORMAL_975: Final = 1.959964
"""The 97.5th percentile of the normal distribution."""

Bools = npt.NDArray[np.bool_]


def ratio_estimate(sums: Floats, counts: Floats, *, seed: int, exponential: bool = False) -> Estimate:
    """A mean over positions, ``sum(sums) / sum(counts)``, with its interval over samples.

    Args:
        sums: float64 ``[samples]``: sum of a figure over a sample's positions.
        counts: float64 ``[samples]``: these positions.
        seed: of the draws.
        exponential: give the exponential of the mean, such as a ratio of perplexities.
    """
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    totals = counts[draws].sum(axis=1)
    # A draw of samples that have no position says nothing.
    means = sums[draws].sum(axis=1)[totals > 0] / totals[totals > 0]
    value = sums.sum() / counts.sum()
    low, high = np.percentile(means, PERCENTILES)
    if exponential:
        value, low, high = np.exp(value), np.exp(low), np.exp(high)
    return Estimate(value=float(value), low=float(low), high=float(high))


def paired_share_difference(before: Bools, after: Bools) -> Estimate:
    """Change of a share over the same samples, with the interval of Bonett and Price (2012).

    A bootstrap of samples none of which changed gives an interval of no width, as if twenty samples could prove that
    nothing was lost. This one adds half a sample to either kind of change, and keeps its 95 % there.

    Args:
        before, after: bool ``[samples]``.
    """
    count = len(before)
    lost, gained = float((before & ~after).sum()), float((after & ~before).sum())
    down, up = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    half = NORMAL_975 * np.sqrt((down + up - (up - down) ** 2) / (count + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    value = (gained - lost) / count
    # The middle is drawn towards nothing; where every sample changed, the value itself is the end.
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)))


def paired_times(sums: Floats, others: Floats, *, seed: int) -> Estimate | None:
    """One total over another of the same samples, ``sum(sums) / sum(others)``, with its interval over samples.

    Args:
        sums, others: float64 ``[samples]``, not negative.
        seed: of the draws.

    Returns:
        None where `others` are all zero.
    """
    if not others.any():
        return None
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    below = others[draws].sum(axis=1)
    times = sums[draws].sum(axis=1)[below > 0] / below[below > 0]
    low, high = np.percentile(times, PERCENTILES)
    return Estimate(value=float(sums.sum() / others.sum()), low=float(low), high=float(high))
