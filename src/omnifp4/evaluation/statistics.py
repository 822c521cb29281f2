"""Figures of many samples, with confidence intervals from paired data.

Positions of one sample are not independent, so whole samples are drawn, with replacement and with the same draws for
every figure of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from omnifp4.evaluation.distributions import Floats
from omnifp4.receipt.evaluation import Estimate

RESAMPLES: Final = 2_000
PERCENTILES: Final = (2.5, 97.5)


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


def mean_estimate(values: Sequence[float] | Floats, *, seed: int) -> Estimate:
    """A mean over samples, with its interval."""
    array = np.asarray(values, dtype=np.float64)
    return ratio_estimate(array, np.ones_like(array), seed=seed)
