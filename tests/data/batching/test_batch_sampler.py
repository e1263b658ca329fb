"""Batch sampling: one order of the rows for every number of processes, each row once, within the budget, balanced."""

from __future__ import annotations

from collections import Counter
from itertools import chain, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler

from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler, balance


def alone(count: int) -> Mixture:
    return Mixture.by_repeats([count], [1.0])


def llava_like(count: int, seed: int = 0) -> Any:
    """A picture of 576 tokens in nineteen of twenty, and text around a median of 130 tokens."""
    random = np.random.default_rng(seed)
    text = np.clip(random.lognormal(np.log(130), 0.9, count), 12, 1400).astype(np.int64)
    return text + 576 * (random.random(count) < 0.95)


def steps(batches: list[MixtureBatchSampler], accumulation: int) -> list[Counter[int]]:
    """The rows of each optimizer step, over all processes."""
    ranks = [list(each) for each in batches]
    assert len({len(rank) for rank in ranks}) == 1
    assert [len(rank) for rank in ranks] == [len(each) for each in batches]
    starts = range(0, len(ranks[0]), accumulation)
    return [Counter(chain.from_iterable(chain.from_iterable(r[i : i + accumulation] for r in ranks))) for i in starts]


def test_the_order_equals_that_of_torchs_sampler() -> None:
    batches = MixtureBatchSampler(alone(23), seed=5, size=4)
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        sampler = RandomSampler(range(23), generator=torch.Generator().manual_seed(5 + epoch))
        assert list(batches) == list(BatchSampler(sampler, 4, drop_last=False))


@pytest.mark.parametrize("kind", ["size", "lengths", "by_length", "tokens", "packed"])
@pytest.mark.parametrize("count", [1, 7, 48, 101])
def test_a_step_has_the_same_rows_for_every_number_of_processes(kind: str, count: int) -> None:
    lengths = None if kind == "size" else llava_like(count)
    more: dict[str, Any] = {"by_length": kind == "by_length"}
    if kind in ("tokens", "packed"):
        more = {"tokens": 4096, "packed": kind == "packed"}
    steps_by_size = []
    for world_size, accumulation, size in ((1, 6, 2), (2, 3, 2), (3, 2, 2), (6, 1, 2)):
        of = [
            MixtureBatchSampler(
                alone(count),
                seed=1,
                size=size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                lengths=lengths,
                **more,
            )
            for rank in range(world_size)
        ]
        for each in of:
            each.set_epoch(3)
        steps_by_size.append(steps(of, accumulation))
    assert all(other == steps_by_size[0] for other in steps_by_size[1:])
    assert sum(steps_by_size[0], Counter()) == Counter(range(count))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=80), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_batches_stay_within_the_budget_and_no_row_is_lost(
    lengths: list[int], world_size: int, accumulation: int, packed: bool
) -> None:
    if not any(lengths):
        lengths[0] = 1
    of = [
        MixtureBatchSampler(
            alone(sum(length > 0 for length in lengths)),
            seed=0,
            size=1,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            lengths=np.array(lengths),
            tokens=50,
            packed=packed,
            largest_first=True,
        )
        for rank in range(world_size)
    ]
    batches_by_rank = [list(each) for each in of]
    assert len({len(each) for each in batches_by_rank}) == 1
    assert Counter(chain.from_iterable(chain.from_iterable(batches_by_rank))) == Counter(
        i for i, length in enumerate(lengths) if length
    )
    for batch in chain.from_iterable(batches_by_rank):
        sizes = [lengths[row] for row in batch]
        assert (sum(sizes) if packed else max(sizes, default=0) * len(sizes)) <= 50


@pytest.mark.parametrize("more", [{}, {"tokens": 64}, {"tokens": 64, "packed": True}], ids=["size", "tokens", "packed"])
def test_the_largest_batch_is_first_in_the_first_epoch_only(more: dict[str, Any]) -> None:
    lengths = np.array([3, 9, 4, 50, 2, 7, 7, 1] * 4)
    lengths[13] = 60
    for seed in range(8):  # by chance the largest batch may come first anyway
        plain = MixtureBatchSampler(alone(32), seed=seed, size=4, lengths=lengths, **more)
        batches = MixtureBatchSampler(alone(32), seed=seed, size=4, lengths=lengths, largest_first=True, **more)
        largest = max(lengths[batch].sum() if "packed" in more else lengths[batch].max() * len(batch) for batch in batches)
        first = next(iter(batches))
        assert (lengths[first].sum() if "packed" in more else lengths[first].max() * len(first)) == largest
        assert Counter(chain.from_iterable(batches)) == Counter(range(32))
        batches.set_epoch(1)
        assert list(batches) == list(_at(plain, 1))


def test_the_largest_batch_is_reported_with_and_without_padding() -> None:
    lengths = np.array([3, 9, 4, 50, 2, 7, 0, 60])
    largest = MixtureBatchSampler(alone(7), seed=2, size=2, lengths=lengths).largest()
    assert largest["rows"] == 2 and largest["padded_tokens"] == 120 and 62 <= largest["tokens"] <= 110


def _at(batches: MixtureBatchSampler, epoch: int) -> MixtureBatchSampler:
    batches.set_epoch(epoch)
    return batches


@pytest.mark.parametrize("world_size", [8, 64, 512])
@pytest.mark.parametrize("kind", ["packed", "tokens", "size"])
def test_processes_have_equal_work_within_three_per_cent(world_size: int, kind: str) -> None:
    lengths = llava_like(world_size * 160)
    more: dict[str, Any] = {"tokens": 16384, "packed": kind == "packed"} if kind != "size" else {}
    of = [
        iter(MixtureBatchSampler(alone(len(lengths)), seed=0, size=16, rank=r, world_size=world_size, lengths=lengths, **more))
        for r in range(min(world_size, 8))
    ]
    tokens = np.array([[lengths[batch].sum() for batch in batches] for batches in of]).T
    whole = tokens[:-1]  # the last step is incomplete
    worst = whole.max(axis=1) / whole.mean(axis=1) - 1
    assert len(whole) >= 4
    assert max(sorted(worst)[:-1]) < 0.03


def test_spreading_fills_every_batch_and_balances_it() -> None:
    rows = np.arange(12)
    lengths = np.array([100, 1, 1, 1, 50, 50, 1, 1, 1, 1, 90, 7])
    balanced = balance(rows, lengths, 3, 4)
    assert sorted(chain.from_iterable(balanced)) == list(range(12)) and [len(batch) for batch in balanced] == [4, 4, 4]
    assert max(lengths[batch].sum() for batch in balanced) == 103  # the best there is: 100 with three of one token


def test_the_batches_of_a_step_need_the_least_padding() -> None:
    lengths = np.array([5, 90, 7, 31, 12, 88])
    batches = list(MixtureBatchSampler(alone(6), seed=0, size=2, accumulation=3, lengths=lengths))
    divisions = {
        sum(max(lengths[order[i]], lengths[order[i + 1]]) for i in (0, 2, 4)) for order in map(list, permutations(range(6)))
    }
    assert sorted(chain.from_iterable(batches)) == list(range(6))
    assert sum(lengths[batch].max() for batch in batches) == min(divisions)


def test_grouping_by_length_gives_a_step_similar_rows_and_other_ones_in_every_epoch() -> None:
    lengths = llava_like(1003)
    batches = MixtureBatchSampler(alone(1003), seed=0, size=8, lengths=lengths, by_length=True)
    random = MixtureBatchSampler(alone(1003), seed=0, size=8, lengths=lengths)
    epochs = [list(_at(batches, epoch)) for epoch in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(random), len(random)]
    assert all(Counter(chain.from_iterable(epoch)) == Counter(range(1003)) for epoch in epochs)
    assert not {frozenset(batch) for batch in epochs[0]} & {frozenset(batch) for batch in epochs[1]}
    assert _padding(lengths, epochs[0]) < 0.1 * _padding(lengths, list(random))
    # The steps come in random order, and the one that is not full is the last and has rows of any length.
    longest = np.array([lengths[batch].max() for batch in epochs[0]])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
    assert [len(batch) for batch in epochs[0]] == [8] * 125 + [3]
    assert sorted(epochs[0][-1]) == sorted(list(_at(random, 0))[-1])


def _padding(lengths: Any, batches: list[list[int]]) -> int:
    return sum(int(lengths[batch].max() * len(batch) - lengths[batch].sum()) for batch in batches)


def test_the_last_rows_are_distributed_and_none_is_repeated() -> None:
    of = [list(MixtureBatchSampler(alone(5), seed=0, size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [[len(batch) for batch in rank] for rank in of] == [[2, 1], [2, 0]]
    dropped = [list(MixtureBatchSampler(alone(5), seed=0, size=2, rank=rank, world_size=2, drop_last=True)) for rank in range(2)]
    assert [[len(batch) for batch in rank] for rank in dropped] == [[2], [2]]


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_repeats_and_ratios_take_what_the_weights_say() -> None:
    assert Mixture.by_repeats([10, 4, 7], [1.0, 2.5, 0.3]).draws == (10, 10, 2)
    assert Mixture.by_ratio([10, 90], [1.0, 1.0]).draws == (50, 50)
    assert Mixture.by_ratio([10, 10, 10], [1.0, 1.0, 5.0]).draws == (4, 4, 22)
    assert Mixture.by_ratio([10, 0, 10], [1.0, 9.0, 1.0]).draws == (10, 0, 10)  # a source with no row that can train


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 4)), min_size=1, max_size=4), st.booleans())
def test_every_row_is_met_equally_often_over_the_epochs(sources: list[tuple[int, float]], ratio: bool) -> None:
    counts, weights = zip(*sources, strict=True)
    mixture = (Mixture.by_ratio if ratio else Mixture.by_repeats)(counts, weights)
    met: Counter[int] = Counter()
    for epoch in range(7):
        rows = mixture.rows(0, epoch)
        assert len(rows) == len(mixture)
        met.update(rows.tolist())
    start = 0
    for count, take in zip(counts, mixture.draws, strict=True):
        times = [met[row] for row in range(start, start + count)]
        assert sum(times) == 7 * take and max(times) - min(times) <= 1
        start += count


def test_a_source_of_half_weight_has_another_half_in_the_next_epoch() -> None:
    batches = MixtureBatchSampler(Mixture.by_repeats([8, 6], [1.0, 0.5]), seed=0, size=1)
    first, second = set(chain.from_iterable(batches)), set(chain.from_iterable(_at(batches, 1)))
    assert first & second == set(range(8)) and first | second == set(range(14))


@pytest.mark.parametrize("kind", ["size", "tokens", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_every_epoch_has_as_many_batches_as_announced(kind: str, seed: int) -> None:
    """Also where rows cannot train and an epoch takes a part of them."""
    lengths = np.random.default_rng(seed).integers(1, 40, 100)
    lengths[np.random.default_rng(seed + 9).permutation(100)[:40]] = 0
    more: dict[str, Any] = {"tokens": 90, "packed": kind == "packed"} if kind != "size" else {}
    mixture = Mixture.by_repeats([60], [0.5])
    batches = MixtureBatchSampler(mixture, seed=seed, size=2, accumulation=3, lengths=lengths, steps=30, **more)
    met: Counter[int] = Counter()
    for epoch in range(4):
        epoch_batches = list(_at(batches, epoch))
        assert len(epoch_batches) == len(batches)
        met.update(chain.from_iterable(epoch_batches))
    assert met == dict.fromkeys(np.flatnonzero(lengths).tolist(), 2)


def test_packed_epochs_of_parts_of_a_source_have_equally_many_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    batches = MixtureBatchSampler(
        Mixture.by_repeats([50], [0.3]), seed=0, size=1, lengths=lengths, tokens=50, packed=True, accumulation=2, epochs=6
    )
    for epoch in range(6):
        epoch_batches = list(_at(batches, epoch))
        assert len(epoch_batches) == len(batches) and all(lengths[batch].sum() <= 50 for batch in epoch_batches)
