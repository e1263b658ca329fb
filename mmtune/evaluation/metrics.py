"""Exact match, its confidence interval, and the accuracy of the majority-class baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist


def final_answer(text: str, marker: str | None) -> str:
    """The text after the last `marker`, or the whole text if it has no marker; stripped."""
    return (text.rpartition(marker)[2] if marker else text).strip()


def normalize(answer: str) -> str:
    """Text for comparison: case-folded, whitespace collapsed, and one trailing full stop removed."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two final answers are equal after `normalize`."""
    return normalize(prediction) == normalize(reference)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927, JASA 22:209-212); valid near 0 and 1 and for small samples.

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


def majority_accuracy(answers: Sequence[str], tasks: Sequence[str | None]) -> float:
    """Accuracy of the majority-class baseline: the most frequent reference answer of each task, whatever the image."""
    if not answers:
        return 0.0
    by_task: dict[str | None, Counter[str]] = {}
    for answer, task in zip(answers, tasks, strict=True):
        by_task.setdefault(task, Counter())[normalize(answer)] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_task.values()) / len(answers)
