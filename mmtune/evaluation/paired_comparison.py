"""Paired comparison of two models on the same questions: difference, clustered interval, permutation test, detectable difference.

Questions about one image or document are a cluster: their answers are not independent. Everything here works on sums over
clusters of a metric's statistics, from which its headline number is computed, so that it holds for means and for ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtune.evaluation.metrics.intervals import cluster_sums
from mmtune.evaluation.metrics.metric import Array

EXACT_CLUSTERS = 14
"""Up to this number of clusters with a difference, all sign flips are enumerated."""
DRAWS = 10_000
"""Random sign flips for more clusters. The Monte Carlo error of p = 0.05 is then 0.002."""
CHUNK = 2**22
"""Signs that are drawn at once."""
CONFIDENCE, POWER = 0.95, 0.8

Headline = Callable[[Array], Array]
"""From sums of statistics of shape (..., k) to the headline number of shape (...)."""


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two models, the second minus the first.

    Attributes:
        rows, clusters: how many are compared.
        first, second: the headline numbers.
        interval: the 95% confidence interval of the difference; None if it cannot be estimated, from one cluster or from clusters
            that all have the same difference.
        p_value: two-sided.
        test: the name of the test.
        detectable: the smallest true difference that a test at 5% finds with a probability of 80%; None as for the interval.
    """

    rows: int
    clusters: int
    first: float
    second: float
    interval: tuple[float, float] | None
    p_value: float
    test: str
    detectable: float | None

    @property
    def difference(self) -> float:
        """The second number minus the first."""
        return self.second - self.first


def paired_difference(
    first: Array, second: Array, clusters: Sequence[str], headline: Headline, proportion: bool = False
) -> PairedDifference:
    """Compare two models.

    Args:
        first, second: statistics of each row, shape (rows, k), in the same order.
        clusters: the cluster of each row.
        headline: the metric's headline number.
        proportion: whether it is a proportion of rows, with (0 or 1, 1) as statistics of a row. The interval then stays within
            -1 and 1.
    """
    sums = cluster_sums(first, clusters), cluster_sums(second, clusters)
    count = len(sums[0])
    before, after = (float(headline(each.sum(axis=0))) for each in sums)
    error = jackknife_error(*sums, headline)
    interval = detectable = None
    if error > 0:
        from scipy.stats import t  # slow to import

        high, power = (float(t.ppf(level, count - 1)) for level in ((1 + CONFIDENCE) / 2, POWER))
        low, top = after - before - high * error, after - before + high * error
        interval = (max(low, -1.0), min(top, 1.0)) if proportion else (low, top)
        detectable = (high + power) * error
    if proportion and count == len(first):
        p_value, test = mcnemar(first[:, 0], second[:, 0]), "exact McNemar test"
    else:
        p_value, test = sign_flip_test(*sums, headline)
    return PairedDifference(len(first), count, before, after, interval, p_value, test, detectable)


def jackknife_error(first: Array, second: Array, headline: Headline) -> float:
    """The standard error of the difference of two headline numbers, by the jackknife over clusters.

    Each cluster is left out in turn (Efron and Tibshirani, 1993, chapter 11). For a mean over clusters of equal size it is the
    usual standard error of paired differences; for a regression it is the cluster-robust CV3 (MacKinnon, Nielsen and Webb, 2023).

    Args:
        first, second: sums of statistics, shape (clusters, k).

    Returns:
        0 for fewer than two clusters, or if all have the same difference.
    """
    count = len(first)
    if count < 2:
        return 0.0
    without = headline(second.sum(axis=0) - second) - headline(first.sum(axis=0) - first)
    without = without[~np.isnan(without)]
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum())) if len(without) > 1 else 0.0
    return error if error > 1e-12 * (1 + float(np.abs(without).max(initial=0))) else 0.0


def sign_flip_test(first: Array, second: Array, headline: Headline, seed: int = 0) -> tuple[float, str]:
    """The permutation test of paired clusters: under no difference, the two models of a cluster can be exchanged.

    All exchanges are enumerated if few clusters differ; otherwise `DRAWS` random ones, and p = (b + 1) / (n + 1) with b of n that
    are as extreme (Phipson and Smyth, 2010), which never rejects too often.

    Args:
        first, second: sums of statistics, shape (clusters, k).
        seed: the same data and seed give the same p-value.

    Returns:
        The two-sided p-value, and the name of the test.
    """
    middle, half = (first + second).sum(axis=0) / 2, (second - first) / 2
    half = half[(half != 0).any(axis=1)]
    count = len(half)
    observed = abs(_difference(np.ones((1, count)), middle, half, headline)[0])
    limit = observed - 1e-9 * max(observed, 1e-3)  # exchanges with the same difference up to rounding count
    if count <= EXACT_CLUSTERS:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)
        values = np.abs(_difference(signs, middle, half, headline))
        return float((values >= limit).mean()), "exact sign-flip permutation test"
    generator = np.random.default_rng(seed)
    extreme, left = 0, DRAWS
    while left:
        size = min(left, max(1, CHUNK // count))
        signs = 1 - 2 * generator.integers(0, 2, (size, count), dtype=np.int8).astype(np.float64)
        extreme += int((np.abs(_difference(signs, middle, half, headline)) >= limit).sum())
        left -= size
    return (extreme + 1) / (DRAWS + 1), f"sign-flip permutation test, {DRAWS:,} draws"


def _difference(signs: Array, middle: Array, half: Array, headline: Headline) -> Array:
    """The differences after exchanges of clusters: shape (exchanges, clusters) to (exchanges,)."""
    change = signs @ half
    return headline(middle + change) - headline(middle - change)


def mcnemar(first: Array, second: Array) -> float:
    """The two-sided p-value of the exact McNemar test (McNemar, 1947, Psychometrika 12:153-157): a binomial test of the rows on
    which exactly one of the models is right.

    Args:
        first, second: 0 or 1 for each row.
    """
    worse, better = int((first > second).sum()), int((second > first).sum())
    if worse == better:
        return 1.0
    from scipy.stats import binomtest  # slow to import

    return float(binomtest(worse, worse + better).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979, Scandinavian Journal of Statistics 6:65-70)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
