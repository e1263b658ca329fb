"""Confidence intervals against closed forms, and clusters of questions about one image."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from mmtune.evaluation.metrics.intervals import confidence_interval, effective_sample_size, wilson_interval
from mmtune.evaluation.metrics.metric import Item, Metric
from mmtune.evaluation.metrics.metric_table import METRICS

PROPORTION, MEAN = METRICS["exact_match"], METRICS["anls"]


def _interval(metric: Metric, values: list[float], clusters: list[str]) -> tuple[float, float]:
    interval = confidence_interval(metric, metric.statistics([], values), clusters)
    assert interval is not None
    return interval


def test_independent_answers_have_the_wilson_interval() -> None:
    values = [1.0] * 70 + [0.0] * 30
    assert _interval(PROPORTION, values, [str(n) for n in range(100)]) == wilson_interval(70, 100)


def test_answers_given_several_times_count_once_each() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0] * 4
    clusters = [str(n) for n in range(40)]
    once = _interval(PROPORTION, values, clusters)
    twice = _interval(PROPORTION, values * 2, clusters * 2)
    assert twice == pytest.approx(once, abs=0.005)  # the variance between clusters divides by 39, not by 40
    assert effective_sample_size(np.array([[2 * v, 2] for v in values])) == pytest.approx(39)
    assert _interval(MEAN, values * 2, clusters * 2) == _interval(MEAN, values, clusters)


def test_a_cluster_with_right_and_wrong_answers_does_not_narrow_the_interval() -> None:
    values, clusters = [1.0, 0.0] * 50, [str(n // 2) for n in range(100)]
    assert _interval(PROPORTION, values, clusters) == wilson_interval(50, 100)


def test_all_answers_right_in_few_clusters() -> None:
    assert _interval(PROPORTION, [1.0] * 100, [str(n % 5) for n in range(100)]) == wilson_interval(5, 5)
    assert _interval(PROPORTION, [1.0] * 100, ["one"] * 100) == wilson_interval(1, 1)
    assert _interval(PROPORTION, [1.0, 0.0], ["one"] * 2) == wilson_interval(0.5, 1)


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval_and_repeats() -> None:
    values = list(np.random.default_rng(0).beta(2, 5, size=400))
    clusters = [str(n) for n in range(400)]
    low, high = _interval(MEAN, values, clusters)
    half = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.1 * half)
    assert _interval(MEAN, values, clusters) == (low, high)


def test_one_cluster_has_no_bootstrap_interval() -> None:
    assert confidence_interval(MEAN, MEAN.statistics([], [0.5, 0.7]), ["one", "one"]) is None
    assert confidence_interval(MEAN, MEAN.statistics([], []), []) is None
    assert confidence_interval(PROPORTION, PROPORTION.statistics([], []), []) == (0, 1)


def test_equal_clusters_have_no_bootstrap_interval() -> None:
    for score, counts in ((1.0, [1] * 2), (0.1, [1, 2, 3]), (1 / 3, [7] * 500)):
        clusters = [str(number) for number, count in enumerate(counts) for _ in range(count)]
        assert confidence_interval(MEAN, MEAN.statistics([], [score] * len(clusters)), clusters) is None
        assert confidence_interval(MEAN, MEAN.statistics([], [0.9, *[score] * (len(clusters) - 1)]), clusters) is not None
    reads = [Item("abcd", ("abcd",), str(number)) for number in range(3)]
    assert confidence_interval(METRICS["cer"], METRICS["cer"].statistics(reads, [0.0] * 3), ["a", "b", "c"]) is None


def test_macro_f1_and_confusion_equal_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    references = generator.choice(["cat", "dog", "bird", "fish"], size=300, p=[0.6, 0.2, 0.15, 0.05])
    predictions = np.where(generator.random(300) < 0.7, references, generator.choice(["cat", "dog", "bird", "fish"], size=300))
    metric = METRICS["classification"]
    items = [Item(p, (r,), "", {"choices": ("cat", "dog", "bird", "fish")}) for p, r in zip(predictions, references, strict=True)]
    scores = metric.score_all(items)
    assert np.mean(scores) == pytest.approx(accuracy_score(references, predictions), abs=1e-12)
    further = metric.further(items, scores)
    assert further["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"), abs=1e-12)
    assert sum(sum(row.values()) for row in further["confusion"].values()) == 300
    assert further["confusion"]["fish"].get("cat", 0) == sum((references == "fish") & (predictions == "cat"))
