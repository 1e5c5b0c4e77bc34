"""Means with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value measured on a sample, and its standard error; None if there is only one cluster."""

    value: float
    standard_error: float | None

    def __str__(self) -> str:
        value, error = self.value, self.standard_error
        if error is None:
            return f"{value:.5g}"
        if not 1e-6 * abs(value) < error or abs(value) < 1e-5:
            return f"{value:.5g} ± {error:.1g}"
        digits = max(0, 1 - math.floor(math.log10(error)))  # two significant digits of the error
        return f"{value:.{digits}f} ± {error:.{digits}f}"


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Returns the mean of all values, with a standard error that allows values of one cluster to depend on each other.

    With r_g the sum of the residuals of cluster g, G clusters and N values, the squared standard error is G / (G - 1) ·
    Σ_g r_g² / N². This is the standard error of a ratio of sums over clusters, which may differ in size.

    Args:
        values: [N], float or bool.
        clusters: [N] int, the cluster of each value.

    Source: Cochran, "Sampling Techniques", 3rd edition, section 6.3; for evaluations of language models, Miller,
    "Adding Error Bars to Evals" (arXiv:2411.00640), section 2.2.
    """
    values = values.astype(np.float64)
    mean = float(values.mean())
    groups = len(names := np.unique(clusters))
    if groups < 2:
        return Estimate(mean, None)
    sums = np.bincount(np.searchsorted(names, clusters), values - mean)
    return Estimate(mean, math.sqrt(groups / (groups - 1) * float(np.square(sums).sum())) / len(values))


def exponential(estimate: Estimate) -> Estimate:
    """Returns exp of an estimate, with the standard error to first order."""
    value, error = math.exp(estimate.value), estimate.standard_error
    return Estimate(value, None if error is None else value * error)


def proportion(successes: int, trials: int) -> Estimate:
    """Returns the share p of successes in independent trials, with the binomial standard error sqrt(p (1 - p) /
    trials).
    """
    p = successes / trials
    return Estimate(p, math.sqrt(p * (1 - p) / trials))
