"""Coverage of the 95% intervals of scores, over simulated evaluations with clusters of questions about one image.

    .venv/bin/python benchmarks/score_intervals.py > benchmarks/results/score_intervals.txt

Each simulation draws images, questions per image (1 to 9), and for each question a score: right or wrong (Wilson interval), or
from 0 to 1 (bootstrap). An image has an effect of its own, so that the scores of its questions are correlated. An interval covers
if it contains the expected score. With 1,000 simulations the standard error of a coverage of 95% is 0.7 points.
"""

from __future__ import annotations

import numpy as np

from mmtune.evaluation.metrics.intervals import confidence_interval
from mmtune.evaluation.metrics.metric_table import METRICS

SIMULATIONS = 1000


def coverage(metric: str, clusters: int, mean: float, correlation: float, by_cluster: bool, seed: int) -> tuple[float, float]:
    """The share of intervals that cover the mean, and their average width.

    Args:
        metric: a proportion, or a mean of scores from 0 to 1.
        mean: the expected score.
        correlation: the intraclass correlation of right and wrong: the probability of an image is drawn from a beta distribution.
        by_cluster: whether the interval uses the clusters, or takes all questions as independent.
    """
    generator = np.random.default_rng(seed)
    covered, width = 0, 0.0
    for _ in range(SIMULATIONS):
        sizes = generator.integers(1, 10, size=clusters)
        strength = (1 - correlation) / correlation if correlation else 1e9
        probabilities = generator.beta(mean * strength, (1 - mean) * strength, size=clusters).repeat(sizes)
        if METRICS[metric].proportion:
            scores = (generator.random(len(probabilities)) < probabilities).astype(float)
        else:
            scores = generator.beta(2 * probabilities + 1e-9, 2 * (1 - probabilities) + 1e-9)
        names = np.arange(clusters).repeat(sizes) if by_cluster else np.arange(len(scores))
        statistics = METRICS[metric].statistics([], list(scores))
        interval = confidence_interval(METRICS[metric], statistics, list(map(str, names)))
        assert interval is not None
        covered += interval[0] <= mean <= interval[1]
        width += interval[1] - interval[0]
    return covered / SIMULATIONS, width / SIMULATIONS


def main() -> None:
    print(f"{'interval':10} {'images':>6} {'mean':>5} {'correlation':>11} {'coverage':>9} {'width':>6} {'without clusters':>17}")
    for metric in ("exact_match", "anls"):
        for clusters in (20, 200):
            for mean in (0.5, 0.9):
                for correlation in (0.0, 0.3):
                    seed = hash((metric == "anls", clusters, round(10 * mean), round(10 * correlation))) % 2**32
                    share, width = coverage(metric, clusters, mean, correlation, True, seed)
                    independent, _ = coverage(metric, clusters, mean, correlation, False, seed)
                    name = "Wilson" if METRICS[metric].proportion else "bootstrap"
                    print(
                        f"{name:10} {clusters:6} {mean:5} {correlation:11} {share:9.1%} {width:6.3f} {independent:17.1%}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
