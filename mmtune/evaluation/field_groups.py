"""Scores by the values of a field of the rows, such as a language, and the gap between the best and the worst group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mmtune.evaluation.answers import Answer, item_scores
from mmtune.evaluation.metrics.intervals import cluster_sums
from mmtune.evaluation.metrics.metric_table import recorded_metric
from mmtune.evaluation.paired_comparison import difference_interval

NO_VALUE = "(none)"
"""The group of rows without the field."""


def field_groups(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The scores of scored answers by each field of their `groups`, for each metric, as JSON values.

    Returns:
        Objects with `field`, `metric`, `scores` (a `Score` for each value, which is its `task`, in the order of first rows), and
        `gap`: `lowest` and `highest`, the values with these scores, `difference`, the highest score minus the lowest, and
        its `interval` as by `difference_interval`; a cluster may be in both groups. The gap is None for a field with one value.
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
            if len(by_value) > 1:
                statistics = metric.statistics(items, scores)
                parts = [statistics * np.array([[value == each.task] for value in values]) for each in (lowest, highest)]
                chosen = np.array([value in (lowest.task, highest.task) for value in values])
                clusters = [answer.cluster for answer, included in zip(own, chosen, strict=True) if included]
                sums = [cluster_sums(part[chosen], clusters) for part in parts]
                gap = {
                    "lowest": lowest.task,
                    "highest": highest.task,
                    "difference": highest.score - lowest.score,
                    "interval": difference_interval(sums[0], sums[1], metric.headline),
                }
            results.append({"field": field, "metric": name, "scores": [asdict(score) for score in by_value], "gap": gap})
    return results
