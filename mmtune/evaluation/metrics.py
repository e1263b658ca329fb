"""Exact match, its interval, and what always giving the commonest answer would reach."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist


def final_answer(text: str, marker: str | None) -> str:
    """What an answer concludes: the text after the last `marker`, or all of it where there is none, without outer space."""
    return (text.rpartition(marker)[2] if marker else text).strip()


def normalize(answer: str) -> str:
    """Case, outer space, runs of space and one closing full stop do not count."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two final answers are the same text after `normalize`."""
    return normalize(prediction) == normalize(reference)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, 1927, JASA 22:209-212), which holds near 0 and 1 and in small samples.

    Returns:
        (low, high), both within [0, 1]; (0, 1) when `total` is 0.
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if correct == 0 else max(0.0, (centre - spread) / scale)  # exact where rounding would leave 1e-17
    return low, 1.0 if correct == total else min(1.0, (centre + spread) / scale)


def majority_accuracy(answers: Sequence[str], tasks: Sequence[str | None]) -> float:
    """Accuracy of giving, for each task, its commonest reference answer: what a model reaches that never looks."""
    if not answers:
        return 0.0
    by_task: dict[str | None, Counter[str]] = {}
    for answer, task in zip(answers, tasks, strict=True):
        by_task.setdefault(task, Counter())[normalize(answer)] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_task.values()) / len(answers)
