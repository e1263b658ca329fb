"""Scores by the values of a field of the rows, such as a language, and the gap between the best and the worst group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mmtune.evaluation.answers import Answer, item_scores, statistics_of
from mmtune.evaluation.metrics.intervals import confidence_interval
from mmtune.evaluation.metrics.metric_table import recorded_metric

NO_VALUE = "(none)"
"""The group of rows without the field."""


def field_groups(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The scores of scored answers by each field of their `groups`, for each metric, as JSON values.

    Returns:
        Objects with `field`, `metric`, `scores` (a `Score` for each value, which is its `task`, in the order of first rows), and
        `gap`: `lowest` and `highest`, the values with these scores, `difference`, the highest score minus the lowest, and
        its `interval` (`gap_interval`). The gap is None where all scores are equal.
    """
    results = []
    for field in dict.fromkeys(name for answer in answers for name in answer.groups):
        for name in dict.fromkeys(answer.metric for answer in answers):
            own = [answer for answer in answers if answer.metric == name]
            metric = recorded_metric(name)
            items, scores = [answer.item() for answer in own], [answer.score if answer.parsed else None for answer in own]
            values = [answer.groups.get(field, NO_VALUE) for answer in own]
            by_value = item_scores(metric, items, scores, values, every_group=True)[:-1]
            lowest, highest = (choose(by_value, key=lambda score: score.score) for choose in (min, max))
            gap = None
            if highest.score > lowest.score:
                ends = []
                for each in (lowest, highest):
                    group = [answer for answer, value in zip(own, values, strict=True) if value == each.task]
                    clusters = [answer.cluster for answer in group]
                    interval = confidence_interval(metric, statistics_of(metric, group), clusters, pair_confidence(len(by_value)))
                    ends.append((each.score, interval))
                gap = {
                    "lowest": lowest.task,
                    "highest": highest.task,
                    "difference": highest.score - lowest.score,
                    "interval": gap_interval(*ends),
                }
            results.append({"field": field, "metric": name, "scores": [asdict(score) for score in by_value], "gap": gap})
    return results


def pair_confidence(groups: int) -> float:
    """The confidence of the interval of one pair of groups, so that those of all pairs hold together in 95% (Bonferroni).

    The pair with the largest difference is chosen from the data: an interval for a pair that was chosen before would exclude no
    difference in a quarter of the cases for five equal groups.
    """
    return 1 - 0.05 / (groups * (groups - 1) / 2)


def gap_interval(
    lowest: tuple[float, tuple[float, float] | None], highest: tuple[float, tuple[float, float] | None]
) -> tuple[float, float] | None:
    """The interval of the difference of two numbers from their own intervals, as if they were independent.

    The method of Newcombe (1998, Statistics in Medicine 17:873-890, method 10; MOVER). With images in both groups it is too wide.

    Args:
        lowest, highest: a number and its interval.

    Returns:
        (low, high); None if one of them has no interval.
    """
    (low, low_interval), (high, high_interval) = lowest, highest
    if low_interval is None or high_interval is None:
        return None
    below = math.hypot(high - high_interval[0], low_interval[1] - low)
    above = math.hypot(high_interval[1] - high, low - low_interval[0])
    return high - low - below, high - low + above
