"""Paired comparison against scipy, closed forms and enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mmtune.evaluation import paired_comparison
from mmtune.evaluation.metrics.metric import Array, ratio
from mmtune.evaluation.paired_comparison import holm, jackknife_error, mcnemar, paired_difference, sign_flip_test

SCORES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=12)


def mean(sums: Array) -> Array:
    return ratio(sums[..., 0], sums[..., 1])


def _statistics(values: Any) -> Array:
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _single(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("count", [5, 40])
def test_rows_of_their_own_give_the_paired_t_interval(count: int) -> None:
    random = np.random.default_rng(count)
    first, second = random.random(count), random.random(count)
    result = paired_difference(_statistics(first), _statistics(second), _single(count), mean)
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert result.interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert result.difference == pytest.approx((second - first).mean(), rel=1e-12)


def test_the_detectable_difference_is_found_with_the_stated_power() -> None:
    """The power of the paired t test at this difference, by scipy's noncentral t distribution."""
    random = np.random.default_rng(0)
    first, second = random.random(60), random.random(60)
    result = paired_difference(_statistics(first), _statistics(second), _single(60), mean)
    assert result.detectable is not None
    noncentrality = result.detectable / ((second - first).std(ddof=1) / 60**0.5)
    critical = stats.t.ppf(0.975, 59)
    assert stats.nct.sf(critical, 59, noncentrality) == pytest.approx(0.8, abs=0.005)


def test_clusters_of_equal_size_are_like_their_means() -> None:
    random = np.random.default_rng(1)
    first, second = random.random((30, 4)), random.random((30, 4))
    clusters = [str(number) for number in range(30) for _ in range(4)]
    result = paired_difference(_statistics(first.ravel()), _statistics(second.ravel()), clusters, mean)
    expected = stats.ttest_rel(second.mean(axis=1), first.mean(axis=1)).confidence_interval(0.95)
    assert result.interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (result.rows, result.clusters) == (120, 30)


def test_the_error_of_a_ratio_is_that_of_leaving_out_each_cluster() -> None:
    random = np.random.default_rng(2)
    sums = [np.stack([random.integers(0, 9, 15), random.integers(10, 60, 15)], axis=1).astype(float) for _ in range(2)]
    without = []
    for left_out in range(15):
        rest = [np.delete(each, left_out, axis=0).sum(axis=0) for each in sums]
        without.append(rest[1][0] / rest[1][1] - rest[0][0] / rest[0][1])
    assert jackknife_error(sums[0], sums[1], mean) == pytest.approx((14 * np.var(without)) ** 0.5, rel=1e-9)


@given(SCORES)
def test_the_exact_test_is_the_enumeration_of_exchanges(rows: list[tuple[int, int, int]]) -> None:
    first, second = (_statistics([row[side] for row in rows]) for side in (0, 1))
    clusters = [str(row[2]) for row in rows]
    result = paired_difference(first, second, clusters, mean)
    observed, extreme = abs(sum(b - a for a, b, _ in rows)), 0
    names = sorted(set(clusters))
    for signs in itertools.product((1, -1), repeat=len(names)):
        flipped = sum((b - a) * signs[names.index(str(cluster))] for a, b, cluster in rows)
        extreme += abs(flipped) >= observed
    assert result.p_value == pytest.approx(extreme / 2 ** len(names), abs=1e-12)
    assert result.test == "exact sign-flip permutation test"


def test_the_exact_test_is_that_of_scipy() -> None:
    random = np.random.default_rng(3)
    change = random.normal(0.4, 1, 11)
    expected = stats.permutation_test((change,), np.mean, permutation_type="samples", n_resamples=np.inf)
    p_value, _ = sign_flip_test(_statistics(np.zeros(11)), _statistics(change), mean)
    assert p_value == pytest.approx(expected.pvalue, abs=1e-12)


def test_random_exchanges_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    first, second = _statistics(random.random(12)), _statistics(random.random(12) + 0.1)
    exact, _ = sign_flip_test(first, second, mean)
    monkeypatch.setattr(paired_comparison, "EXACT_CLUSTERS", 2)
    monkeypatch.setattr(paired_comparison, "CHUNK", 12 * 700)
    drawn, name = sign_flip_test(first, second, mean)
    assert abs(drawn - exact) < 4 * (exact * (1 - exact) / 10_000) ** 0.5 + 1e-4
    assert name == "sign-flip permutation test, 10,000 draws"
    assert sign_flip_test(first, second, mean) == (drawn, name)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_mcnemar_is_the_exact_sign_flip_test_of_rows_of_their_own(rows: list[tuple[bool, bool]]) -> None:
    first, second = (_statistics([row[side] for row in rows]) for side in (0, 1))
    result = paired_difference(first, second, _single(len(rows)), mean, proportion=True)
    assert result.test == "exact McNemar test"
    assert result.p_value == pytest.approx(sign_flip_test(first, second, mean)[0], abs=1e-12)


def test_mcnemar_is_only_for_rows_of_their_own() -> None:
    first, second = _statistics([0, 0, 1, 0]), _statistics([1, 1, 1, 1])
    assert "McNemar" not in paired_difference(first, second, ["a", "a", "b", "c"], mean, proportion=True).test
    assert "McNemar" not in paired_difference(first, second, _single(4), mean).test
    assert mcnemar(first[:, 0], second[:, 0]) == pytest.approx(0.25)  # 2 / 2^3


@given(SCORES)
def test_exchanging_the_models_changes_the_sign_only(rows: list[tuple[int, int, int]]) -> None:
    first, second = (_statistics([row[side] for row in rows]) for side in (0, 1))
    clusters = [str(row[2]) for row in rows]
    there, back = paired_difference(first, second, clusters, mean), paired_difference(second, first, clusters, mean)
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert (there.interval is None) == (back.interval is None)
    if there.interval and back.interval:
        assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-12)


@pytest.mark.parametrize(("clusters", "second"), [(["a", "a"], [1, 0]), (["a", "b"], [0, 0]), (["a", "b"], [1, 1])])
def test_no_interval_is_made_up(clusters: list[str], second: list[int]) -> None:
    result = paired_difference(_statistics([0, 0]), _statistics(second), clusters, mean)
    assert (result.interval, result.detectable) == (None, None)


def test_the_interval_of_a_difference_of_proportions_stays_in_its_range() -> None:
    first, second = np.zeros(50), np.ones(50)
    second[0] = 0
    high = paired_difference(_statistics(first), _statistics(second), _single(50), mean, proportion=True)
    low = paired_difference(_statistics(second), _statistics(first), _single(50), mean, proportion=True)
    assert high.interval is not None and low.interval is not None
    assert high.interval[1] == 1 and 0.9 < high.interval[0] < 0.98 and low.interval == (-1, -high.interval[0])


def test_holm_is_worked_out_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
