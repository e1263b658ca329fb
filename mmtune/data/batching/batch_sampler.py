"""Which rows make which batch: one order of the rows for every layout, cut into the batches of each process.

An optimizer step takes the same rows whether one process accumulates them or several share them, as long as batch x
accumulation x processes stays what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappush, heapreplace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from mmtune.data.batching.bin_packing import pack_lengths

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """How many rows of each source an epoch takes.

    Attributes:
        counts: rows of each source, which lie one after another.
        takes: how many of them an epoch takes. What an epoch leaves over, the next one begins with, so that every row of a source
            is met equally often, give or take one.
    """

    counts: tuple[int, ...]
    takes: tuple[int, ...]

    @classmethod
    def by_repeats(cls, counts: Sequence[int], weights: Sequence[float]) -> Mixture:
        """A weight says how often an epoch takes the source: 0.5 is every other row, 3.0 is each row three times."""
        takes = (max(1, round(count * weight)) if count else 0 for count, weight in zip(counts, weights, strict=True))
        return cls(tuple(counts), tuple(takes))

    @classmethod
    def by_ratio(cls, counts: Sequence[int], weights: Sequence[float]) -> Mixture:
        """A weight says which share of an epoch the source has; an epoch is as long as all sources together."""
        total = sum(counts)
        whole = sum(weight for count, weight in zip(counts, weights, strict=True) if count)
        shares = [total * weight / whole if count else 0.0 for count, weight in zip(counts, weights, strict=True)]
        takes = [int(share) for share in shares]
        for index in sorted(range(len(takes)), key=lambda i: takes[i] - shares[i])[: total - sum(takes)]:
            takes[index] += 1  # what rounding down left over goes to the largest remainders
        return cls(tuple(counts), tuple(takes))

    def __len__(self) -> int:
        return sum(self.takes)

    @property
    def repeats(self) -> int:
        """How many times an epoch takes a row at most."""
        return max((-(-take // count) for count, take in zip(self.counts, self.takes, strict=True) if count), default=1)

    def rows(self, seed: int, epoch: int) -> Rows:
        """An epoch's row numbers, source by source, rows of a source in order where all are taken."""
        parts, start = [], 0
        for number, (count, take) in enumerate(zip(self.counts, self.takes, strict=True)):
            parts.append(start + _rounds(count, take, (seed, number), epoch))
            start += count
        return np.concatenate(parts)


def _rounds(count: int, take: int, key: tuple[int, int], epoch: int) -> Rows:
    """The rows that an epoch takes of one source: a piece of the rounds over its rows, each round in an order of its own."""
    if take == 0:
        return np.empty(0, np.int64)
    if take % count == 0:
        return np.tile(np.arange(count), take // count)
    first, end = epoch * take, (epoch + 1) * take
    pieces = []
    for number in range(first // count, -(-end // count)):
        order = np.random.default_rng((*key, number)).permutation(count)
        pieces.append(order[max(first - number * count, 0) : end - number * count])
    return np.concatenate(pieces)


class MixtureBatchSampler(Sampler[list[int]]):
    """The batches of one process, as lists of row numbers, epoch by epoch.

    Args:
        mixture: what an epoch takes, of the rows that can train.
        seed: of the order; one seed gives one order.
        size: rows in a batch.
        accumulation: batches of each process in an optimizer step.
        rank, world_size: this process and how many there are.
        lengths: tokens of every row, 0 for one that cannot train, which the mixture leaves out; None if they were not counted.
        tokens: the most tokens in a batch, which then replaces `size`.
        packed: `tokens` counts the rows' own tokens, one after another, not the longest row's for each.
        largest_first: the first step of the first epoch is the one with the most tokens in a batch.
        drop_last: leave out the last rows of an epoch that do not fill a step's batches of all processes.
        shuffled: False takes the rows as they lie.
        epochs: how many there will be. Each has the same number of batches, that of the one with the most.
        steps: of the whole run, if these and not the epochs say how long it is.
        visits: give (row number, visit) in place of row numbers, where the visits of a row in a run have numbers of their own.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        lengths: NDArray[np.int64] | None = None,
        tokens: int | None = None,
        packed: bool = False,
        largest_first: bool = False,
        drop_last: bool = False,
        shuffled: bool = True,
        epochs: int = 1,
        steps: int | None = None,
        visits: bool = False,
    ) -> None:
        self._mixture = mixture
        self._visits = visits
        self._seed = seed
        self._size = size
        self._group = accumulation * world_size
        self._rank, self._world_size = rank, world_size
        self._lengths = lengths
        self._usable = None if lengths is None else np.flatnonzero(lengths > 0)
        assert self._usable is None or len(self._usable) == sum(mixture.counts)
        self._tokens = tokens
        self._packed = packed
        self._largest_first = largest_first
        self._drop_last = drop_last
        self._shuffled = shuffled
        self._epoch = 0
        self._wanted = 0
        self._first: list[list[list[int]]] | None = None  # the first epoch's steps, once it is known that they stay as they are
        self._length = self._count(epochs, steps)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Any]]:
        steps = self._steps(self._epoch)
        for step in self._numbered(steps) if self._visits else steps:
            yield from step[self._rank :: self._world_size]

    def _numbered(self, steps: Iterator[list[list[int]]]) -> Iterator[list[list[tuple[int, int]]]]:
        """The epoch's steps of all processes, with the number of each visit: it is the same in every layout."""
        first = self._epoch * self._mixture.repeats
        times: Counter[int] = Counter()

        def visit(row: int) -> tuple[int, int]:
            times[row] += 1
            return row, first + times[row] - 1

        for step in steps:
            yield [[visit(row) for row in batch] for batch in step]

    def largest(self) -> dict[str, int]:
        """The first epoch's batch with the most tokens, padding counted: its `rows`, `tokens` and `padded_tokens`.

        Only where the rows' lengths were counted.
        """
        assert self._lengths is not None
        batch = max((batch for step in self._steps(0) for batch in step), key=self._cost, default=[])
        return {"rows": len(batch), "tokens": int(self._lengths[batch].sum()), "padded_tokens": self._cost(batch)}

    def max_batch_rows(self) -> int:
        """The rows of the first epoch's batch that has the most of them."""
        return max((len(batch) for step in self._steps(0) for batch in step), default=0)

    def _count(self, epochs: int, steps: int | None) -> int:
        if self._tokens is None:
            every = self._size * self._world_size
            return len(self._mixture) // every if self._drop_last else -(-len(self._mixture) // every)
        differ = any(take % count for count, take in zip(self._mixture.counts, self._mixture.takes, strict=True) if count)
        first = list(self._steps(0))
        own = self._wanted = sum(map(len, first))
        if steps is not None and self._wanted:
            epochs = -(-steps * self._group // self._wanted)
        for epoch in range(1, epochs if differ else 1):
            self._wanted = max(self._wanted, sum(map(len, self._steps(epoch))))
        if self._wanted == own:
            self._first = first
        return self._wanted // self._world_size

    def _steps(self, epoch: int) -> Iterator[list[list[int]]]:
        """Each optimizer step's batches, `accumulation * world_size` of them, fewer in an epoch's last step."""
        if epoch == 0 and self._first is not None:
            return iter(self._first)
        rows = self._mixture.rows(self._seed, epoch)
        if self._usable is not None:
            rows = self._usable[rows]
        if self._shuffled:
            rows = rows[_permutation(len(rows), self._seed + epoch)]
        if self._tokens is None:
            steps = self._of_size(rows)
        else:
            steps = iter(self._of_tokens(rows, np.random.default_rng((self._seed, epoch))))
        if self._largest_first and epoch == 0:
            steps = iter(self._with_largest_first(list(steps)))
        return steps

    def _of_size(self, rows: Rows) -> Iterator[list[list[int]]]:
        every = self._size * self._group
        for start in range(0, len(rows), every):
            step = rows[start : start + every]
            if self._drop_last:
                step = step[: len(step) - len(step) % (self._size * self._world_size)]
            if len(step):
                yield self._shared(step)

    def _shared(self, step: Rows) -> list[list[int]]:
        """A step's rows in batches, those of equal place in all processes equally many, with their tokens spread evenly."""
        count = min(self._group, -(-len(step) // (self._size * self._world_size)) * self._world_size)
        if self._lengths is None or count == 1:
            pieces = [step[start : start + self._size].tolist() for start in range(0, len(step), self._size)]
            return pieces + [[] for _ in range(count - len(pieces))]
        return balance(step, self._lengths[step], count, self._size)

    def _of_tokens(self, rows: Rows, random: np.random.Generator) -> list[list[list[int]]]:
        assert self._lengths is not None and self._tokens is not None
        lengths = self._lengths[rows]
        if self._packed:
            batches = [rows[bin_] for bin_ in pack_lengths(lengths, self._tokens)]
        else:
            batches = _alike(rows, lengths, self._tokens)
        batches = _split(batches, max(self._wanted, -(-len(batches) // self._group) * self._group))
        costs = np.array([self._cost(batch) for batch in batches])
        batches = [batches[index] for index in np.argsort(-costs, kind="stable")]  # batches of one step cost alike
        steps = [[b.tolist() for b in batches[start : start + self._group]] for start in range(0, len(batches), self._group)]
        return [steps[index] for index in random.permutation(len(steps))] if self._shuffled else steps

    def _cost(self, batch: Sequence[int] | Rows) -> int:
        assert self._lengths is not None
        if len(batch) == 0:
            return 0
        lengths = self._lengths[np.asarray(batch)]
        return int(lengths.sum() if self._packed else lengths.max() * len(lengths))

    def _with_largest_first(self, steps: list[list[list[int]]]) -> list[list[list[int]]]:
        largest = max(range(len(steps)), key=lambda index: max(map(self._cost, steps[index])))
        return [steps[largest], *steps[:largest], *steps[largest + 1 :]]


def balance(rows: Rows, lengths: NDArray[np.int64], count: int, size: int) -> list[list[int]]:
    """Share rows out among `count` batches of at most `size`: the longest first, each to the batch with the fewest tokens.

    (Graham 1969, SIAM J. Appl. Math. 17:416-429, with a bound on the number of rows.)
    """
    batches: list[list[int]] = [[] for _ in range(count)]
    open_batches = [(0, index) for index in range(count)]
    heapify(open_batches)
    for row in np.argsort(-lengths, kind="stable"):
        while len(batches[open_batches[0][1]]) == size:
            heapreplace(open_batches, (np.iinfo(np.int64).max, open_batches[0][1]))
        tokens, index = open_batches[0]
        batches[index].append(int(rows[row]))
        heapreplace(open_batches, (tokens + int(lengths[row]), index))
    return batches


def _alike(rows: Rows, lengths: NDArray[np.int64], tokens: int) -> list[Rows]:
    """Batches of similar lengths, as many rows each as fit when every row is as long as the longest."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        fits = max(1, tokens // int(lengths[order[start]]))
        batches.append(rows[order[start : start + fits]])
        start += fits
    return batches


def _split(batches: list[Rows], wanted: int) -> list[Rows]:
    """As many batches as wanted, by halving those with the most rows; empty ones where every batch has one row."""
    batches = list(batches)
    largest = [(-len(batch), index) for index, batch in enumerate(batches)]
    heapify(largest)
    for index in range(len(batches), wanted):
        count, most = largest[0]
        half = (1 - count) // 2
        batches.append(batches[most][half:])
        batches[most] = batches[most][:half]
        heapreplace(largest, (-half, most))
        heappush(largest, (half + count, index))
    return batches


def _permutation(count: int, seed: int) -> Rows:
    order: Rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return order
