"""Calibration of `mmtune compare`: how often its tests reject without a difference, and how often its intervals hold the truth.

Every simulation draws the answers of two models to questions about images. The images differ in difficulty, and the models in
what they find difficult, so that answers about one image are alike. Without a difference the models can be exchanged within an
image. With a difference, its true value is known from the probabilities.

Usage: OMP_NUM_THREADS=1 python benchmarks/paired_comparison.py [--simulations 1000] > benchmarks/results/paired_comparison.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmtune.evaluation.metrics.metric import Array, ratio
from mmtune.evaluation.paired_comparison import paired_difference


@dataclass(frozen=True)
class Setting:
    """What is drawn.

    Attributes:
        kind: right (0 or 1), share (a score between 0 and 1) or errors (edits per reference character, as in cer).
        rows: the number of questions about an image: 1, or 1 to this number.
    """

    name: str
    clusters: int
    kind: str
    rows: int


SETTINGS = [
    Setting("right or wrong, 1 question per image", 200, "right", 1),
    Setting("right or wrong, 1 question per image", 20, "right", 1),
    Setting("right or wrong, 1 to 8 questions per image", 200, "right", 8),
    Setting("right or wrong, 1 to 8 questions per image", 20, "right", 8),
    Setting("right or wrong, 1 to 8 questions per image", 12, "right", 8),
    Setting("score from 0 to 1, 1 to 8 questions per image", 200, "share", 8),
    Setting("score from 0 to 1, 1 to 8 questions per image", 20, "share", 8),
    Setting("errors per character, 1 to 8 questions per image", 200, "errors", 8),
    Setting("errors per character, 1 to 8 questions per image", 20, "errors", 8),
]


def headline(sums: Array) -> Array:
    """A mean, or a ratio of sums."""
    return ratio(sums[..., 0], sums[..., 1])


def draw(setting: Setting, effect: float, random: np.random.Generator) -> tuple[Array, Array, list[str], float]:
    """Statistics of both models, the clusters, and the true difference for images drawn like these.

    The difference of the probabilities is `effect` on every question, so that the true difference does not depend on the draw.
    """
    counts = random.integers(1, setting.rows + 1, setting.clusters)
    clusters = np.repeat(np.arange(setting.clusters), counts)
    difficulty = random.beta(4, 4, setting.clusters) * 0.6 + 0.2
    taste = random.uniform(-0.15, 0.15, setting.clusters)  # what one model finds easier than the other, as often as the other way
    rows = len(clusters)
    length = random.integers(5, 60, rows).astype(np.float64)
    sides = []
    for sign in (-1, 1):
        probability = np.clip((difficulty + sign * (taste + effect) / 2)[clusters], 0, 1)
        if setting.kind == "right":
            values, weights = random.random(rows) < probability, np.ones(rows)
        elif setting.kind == "share":
            values, weights = random.beta(4 * probability, 4 * (1 - probability)), np.ones(rows)
        else:
            values, weights = random.binomial(length.astype(int), probability), length
        sides.append(np.stack([values.astype(np.float64), weights], axis=1))
    return sides[0], sides[1], [str(cluster) for cluster in clusters], effect


def simulate(setting: Setting, effect: float, simulations: int) -> Iterator[tuple[float, bool, str]]:
    """For each simulation the p-value, whether the interval holds the true difference, and the name of the test."""
    random = np.random.default_rng(SETTINGS.index(setting))
    for _ in range(simulations):
        first, second, clusters, truth = draw(setting, effect, random)
        result = paired_difference(first, second, clusters, headline, setting.kind == "right")
        held = result.interval is not None and result.interval[0] <= truth <= result.interval[1]
        yield result.p_value, held, result.test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    simulations = parser.parse_args().simulations
    print(f"{simulations:,} simulations of no difference and of a difference of 0.05; tests at 5%, intervals at 95%")
    print(f"{'':65}no difference{'':2}a difference")
    print(f"{'':50}{'images':>7}{'rejected':>10}{'coverage':>10}{'coverage':>10}{'power':>8}  test")
    for setting in SETTINGS:
        null, apart = ([*simulate(setting, effect, simulations)] for effect in (0.0, 0.05))
        columns = [
            np.mean([p <= 0.05 for p, _, _ in null]),
            np.mean([held for _, held, _ in null]),
            np.mean([held for _, held, _ in apart]),
            np.mean([p <= 0.05 for p, _, _ in apart]),
        ]
        tests = ", ".join(sorted({test for _, _, test in null}))
        shown = "".join(f"{value:{width}.1%}" for value, width in zip(columns, (10, 10, 10, 8), strict=True))
        print(f"{setting.name:50}{setting.clusters:7}{shown}  {tests}", flush=True)


if __name__ == "__main__":
    main()
