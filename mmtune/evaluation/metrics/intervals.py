"""95% confidence intervals of a headline number: Wilson for proportions, the bootstrap otherwise, both by cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from mmtune.evaluation.metrics.metric import Array, Metric

RESAMPLES = 2000
"""Bootstrap resamples. The Monte Carlo error of a 95% limit is then about 1% of the interval's width."""

MAX_DRAWS = 1 << 20
"""How many clusters are drawn at once."""


def wilson_interval(correct: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927, JASA 22:209-212); valid near 0 and 1 and for small samples.

    Args:
        correct, total: counts, or effective counts.

    Returns:
        (low, high), both within [0, 1]; (0, 1) when `total` is 0.
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = correct / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if correct == 0 else max(0.0, (centre - spread) / scale)  # exactly 0: rounding could leave 1e-17
    return low, 1.0 if correct == total else min(1.0, (centre + spread) / scale)


def effective_sample_size(sums: Array) -> float:
    """How many independent answers are as informative about a proportion as these clusters.

    The number of answers divided by the design effect, which is the variance of the proportion between clusters (Taylor
    linearization) over the binomial variance (Rao and Scott, 1992, Biometrics 48:577-585); at most the number of answers. If all
    answers have the same score, or are about one cluster, the design effect is unknown, and each cluster counts once.

    Args:
        sums: shape (clusters, 2): correct answers and answers of each cluster.
    """
    clusters = len(sums)
    correct, total = sums.sum(axis=0)
    if clusters == total:
        return float(total)
    if clusters == 1 or correct in (0, total):
        return float(clusters)
    p = correct / total
    variance = clusters / (clusters - 1) * ((sums[:, 0] - p * sums[:, 1]) ** 2).sum() / total**2
    return float(total if variance * total <= p * (1 - p) else p * (1 - p) / variance)


def bootstrap_interval(metric: Metric, sums: Array, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap of a headline number over clusters (Efron and Tibshirani, 1993, chapter 13).

    None if all resamples have the same number: clusters that are all equal do not show how much others vary.

    Args:
        sums: shape (clusters, k): sums of the metric's statistics.
        seed: the same data and seed give the same interval.
    """
    generator, clusters = np.random.default_rng(seed), len(sums)
    values: list[float] = []
    while len(values) < RESAMPLES:
        resamples = min(RESAMPLES - len(values), max(1, MAX_DRAWS // clusters))
        drawn = generator.integers(clusters, size=(resamples, clusters)) + clusters * np.arange(resamples)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=resamples * clusters).reshape(resamples, clusters)
        values += metric.headline(counts @ sums).tolist()
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return (float(low), float(high)) if high - low > 1e-12 * (1 + abs(high)) else None  # rounding


def confidence_interval(
    metric: Metric, statistics: Array, clusters: Sequence[str], confidence: float = 0.95
) -> tuple[float, float] | None:
    """The interval of a metric's headline number.

    Args:
        statistics: shape (items, k), from `Metric.statistics`.
        clusters: the cluster of each item.
        confidence: 0.95 for a 95% interval.

    Returns:
        (low, high); None for a number that is not a proportion of fewer than two clusters, or of clusters that are all equal.
    """
    sums = cluster_sums(statistics, clusters)
    if metric.proportion:
        correct, total = sums.sum(axis=0)
        size = effective_sample_size(sums)
        return wilson_interval(size if correct == total else size * correct / total, size, confidence)
    return bootstrap_interval(metric, sums, confidence) if len(sums) > 1 else None


def cluster_sums(statistics: Array, clusters: Sequence[str]) -> Array:
    """Sums of statistics over each cluster: shape (items, k) to (clusters, k), in the order of first items."""
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in clusters]
    sums = np.zeros((len(numbers), statistics.shape[1]))
    np.add.at(sums, index, statistics)
    return sums
