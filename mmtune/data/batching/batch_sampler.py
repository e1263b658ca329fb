"""Batch sampler: one global order of the rows, split over the batches of all processes.

An optimizer step has the same rows for any number of processes, as long as batch size x accumulation x processes is the same.
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
    """Data mixture: the number of rows of each source in an epoch.

    Attributes:
        counts: number of rows of each source; row numbers are consecutive over the sources.
        draws: number of rows drawn from each source in an epoch. The next epoch starts with the rows that the last one left
            over, so that the numbers of draws of any two rows of a source differ by at most one.
    """

    counts: tuple[int, ...]
    draws: tuple[int, ...]

    @classmethod
    def by_repeats(cls, counts: Sequence[int], weights: Sequence[float]) -> Mixture:
        """A weight is the number of draws of each row in an epoch: 0.5 draws every second row, 3.0 every row three times."""
        draws = (max(1, round(count * weight)) if count else 0 for count, weight in zip(counts, weights, strict=True))
        return cls(tuple(counts), tuple(draws))

    @classmethod
    def by_ratio(cls, counts: Sequence[int], weights: Sequence[float]) -> Mixture:
        """A weight is proportional to the source's share of an epoch; an epoch has as many rows as all sources together."""
        total = sum(counts)
        total_weight = sum(weight for count, weight in zip(counts, weights, strict=True) if count)
        shares = [total * weight / total_weight if count else 0.0 for count, weight in zip(counts, weights, strict=True)]
        draws = [int(share) for share in shares]
        for index in sorted(range(len(draws)), key=lambda i: draws[i] - shares[i])[: total - sum(draws)]:
            draws[index] += 1  # largest remainder method
        return cls(tuple(counts), tuple(draws))

    def __len__(self) -> int:
        return sum(self.draws)

    @property
    def repeats(self) -> int:
        """Maximum number of draws of a row in an epoch."""
        return max((-(-drawn // count) for count, drawn in zip(self.counts, self.draws, strict=True) if count), default=1)

    def rows(self, seed: int, epoch: int) -> Rows:
        """The row numbers of an epoch, source by source; the rows of a source are in order if all are drawn."""
        parts, start = [], 0
        for number, (count, drawn) in enumerate(zip(self.counts, self.draws, strict=True)):
            parts.append(start + _draw_rows(count, drawn, (seed, number), epoch))
            start += count
        return np.concatenate(parts)


def _draw_rows(count: int, drawn: int, key: tuple[int, int], epoch: int) -> Rows:
    """The rows of one source in an epoch: a slice of an endless sequence of random permutations of its rows."""
    if drawn == 0:
        return np.empty(0, np.int64)
    if drawn % count == 0:
        return np.tile(np.arange(count), drawn // count)
    first, end = epoch * drawn, (epoch + 1) * drawn
    pieces = []
    for number in range(first // count, -(-end // count)):
        order = np.random.default_rng((*key, number)).permutation(count)
        pieces.append(order[max(first - number * count, 0) : end - number * count])
    return np.concatenate(pieces)


class MixtureBatchSampler(Sampler[list[int]]):
    """Batch sampler over a data mixture: the batches of one process as lists of row numbers, epoch by epoch.

    Args:
        mixture: the rows of an epoch, among the rows that can train.
        seed: seed of the order.
        size: rows per batch.
        accumulation: batches per process in an optimizer step.
        rank, world_size: rank of this process, and number of processes.
        lengths: tokens of every row, 0 for a row that cannot train and is not in the mixture; None if they were not counted.
        tokens: maximum number of tokens in a batch, instead of `size`.
        packed: count the sum of the rows' tokens for `tokens`, not the number of rows times the longest row.
        largest_first: start the first epoch with the step that has the largest batch.
        drop_last: drop the last rows of an epoch that do not fill a batch in every process.
        shuffled: whether to shuffle the rows.
        by_length: give each optimizer step rows of similar length. Needs `lengths`; the number of rows per step stays the same.
        epochs: number of epochs. All have as many batches as the one with the most.
        steps: number of optimizer steps of the whole run, if that and not `epochs` sets its length.
        visits: yield (row number, visit) instead of row numbers; a visit counts the draws of a row over the run.
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
        by_length: bool = False,
        epochs: int = 1,
        steps: int | None = None,
        visits: bool = False,
    ) -> None:
        self._mixture = mixture
        self._visits = visits
        self._seed = seed
        self._size = size
        self._batches_per_step = accumulation * world_size
        self._rank, self._world_size = rank, world_size
        self._lengths = lengths
        self._usable = None if lengths is None else np.flatnonzero(lengths > 0)
        assert self._usable is None or len(self._usable) == sum(mixture.counts)
        self._tokens = tokens
        self._packed = packed
        self._largest_first = largest_first
        self._drop_last = drop_last
        self._shuffled = shuffled
        self._by_length = by_length
        self._epoch = 0
        self._batch_count = 0
        self._first: list[list[list[int]]] | None = None  # the first epoch's steps, if they are final
        self._length = self._count(epochs, steps)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Any]]:
        steps = self._steps(self._epoch)
        for step in self._add_visits(steps) if self._visits else steps:
            yield from step[self._rank :: self._world_size]

    def _add_visits(self, steps: Iterator[list[list[int]]]) -> Iterator[list[list[tuple[int, int]]]]:
        """The epoch's steps of all processes with the visit of each row, which is the same for any number of processes."""
        first = self._epoch * self._mixture.repeats
        draws: Counter[int] = Counter()

        def visit(row: int) -> tuple[int, int]:
            draws[row] += 1
            return row, first + draws[row] - 1

        for step in steps:
            yield [[visit(row) for row in batch] for batch in step]

    def largest(self) -> dict[str, int]:
        """`rows`, `tokens` and `padded_tokens` of the first epoch's batch with the most tokens, including padding.

        Only if the rows' lengths were counted.
        """
        assert self._lengths is not None
        batch = max((batch for step in self._steps(0) for batch in step), key=self._cost, default=[])
        return {"rows": len(batch), "tokens": int(self._lengths[batch].sum()), "padded_tokens": self._cost(batch)}

    def max_batch_rows(self) -> int:
        """Maximum number of rows in a batch of the first epoch."""
        return max((len(batch) for step in self._steps(0) for batch in step), default=0)

    def _count(self, epochs: int, steps: int | None) -> int:
        if self._tokens is None:
            rows = self._size * self._world_size
            return len(self._mixture) // rows if self._drop_last else -(-len(self._mixture) // rows)
        epochs_differ = any(
            drawn % count for count, drawn in zip(self._mixture.counts, self._mixture.draws, strict=True) if count
        )
        first = list(self._steps(0))
        first_count = self._batch_count = sum(map(len, first))
        if steps is not None and self._batch_count:
            epochs = -(-steps * self._batches_per_step // self._batch_count)
        for epoch in range(1, epochs if epochs_differ else 1):
            self._batch_count = max(self._batch_count, sum(map(len, self._steps(epoch))))
        if self._batch_count == first_count:
            self._first = first
        return self._batch_count // self._world_size

    def _steps(self, epoch: int) -> Iterator[list[list[int]]]:
        """The batches of each optimizer step: `accumulation * world_size`, or fewer in the last step of an epoch."""
        if epoch == 0 and self._first is not None:
            return iter(self._first)
        rows = self._mixture.rows(self._seed, epoch)
        if self._usable is not None:
            rows = self._usable[rows]
        if self._shuffled:
            rows = rows[_permutation(len(rows), self._seed + epoch)]
        random = np.random.default_rng((self._seed, epoch))
        if self._tokens is not None:
            steps = iter(self._steps_by_tokens(rows, random))
        else:
            steps = self._steps_by_size(self._similar_together(rows, random) if self._by_length else rows)
        if self._largest_first and epoch == 0:
            steps = iter(self._with_largest_first(list(steps)))
        return steps

    def _steps_by_size(self, rows: Rows) -> Iterator[list[list[int]]]:
        rows_per_step = self._size * self._batches_per_step
        for start in range(0, len(rows), rows_per_step):
            step = rows[start : start + rows_per_step]
            if self._drop_last:
                step = step[: len(step) - len(step) % (self._size * self._world_size)]
            if len(step):
                yield self._split_step(step)

    def _similar_together(self, rows: Rows, random: np.random.Generator) -> Rows:
        """The same rows with those of similar length in one step: sorted in windows, then the steps in random order.

        Windows have 50 steps, or a quarter of a short epoch, so that every epoch has other steps. The last
        step of an epoch that is not full keeps its random rows: otherwise it would always have the shortest.
        """
        assert self._lengths is not None
        rows_per_step = self._size * self._batches_per_step
        full = len(rows) // rows_per_step
        window = max(2, min(50, full // 4)) * rows_per_step
        head, tail = rows[: full * rows_per_step], rows[full * rows_per_step :]
        windows = [head[start : start + window] for start in range(0, len(head), window)]
        ordered = [piece[np.argsort(-self._lengths[piece], kind="stable")] for piece in windows]
        steps = np.concatenate([head[:0], *ordered]).reshape(full, rows_per_step)
        return np.concatenate([(steps[random.permutation(full)] if self._shuffled else steps).ravel(), tail])

    def _split_step(self, step: Rows) -> list[list[int]]:
        """Split the rows of a step into batches; all processes have the same number of batches.

        With known lengths, the batches that the processes compute at the same time have rows of similar length, which needs
        the least padding, and balanced tokens.
        """
        rounds = -(-len(step) // (self._size * self._world_size))
        if self._lengths is None:
            pieces = [step[start : start + self._size].tolist() for start in range(0, len(step), self._size)]
            return pieces + [[] for _ in range(rounds * self._world_size - len(pieces))]
        if rounds * self._world_size == 1:
            return [step.tolist()]
        order = step[np.argsort(-self._lengths[step], kind="stable")]
        parts = np.array_split(order, rounds)
        return [batch for part in parts for batch in balance(part, self._lengths[part], self._world_size, self._size)]

    def _steps_by_tokens(self, rows: Rows, random: np.random.Generator) -> list[list[list[int]]]:
        assert self._lengths is not None and self._tokens is not None
        lengths = self._lengths[rows]
        if self._packed:
            batches = [rows[bin_] for bin_ in pack_lengths(lengths, self._tokens)]
        else:
            batches = _group_by_length(rows, lengths, self._tokens)
        batches = _split_largest(
            batches, max(self._batch_count, -(-len(batches) // self._batches_per_step) * self._batches_per_step)
        )
        costs = np.array([self._cost(batch) for batch in batches])
        batches = [batches[index] for index in np.argsort(-costs, kind="stable")]  # batches of one step have a similar cost
        steps = [
            [b.tolist() for b in batches[start : start + self._batches_per_step]]
            for start in range(0, len(batches), self._batches_per_step)
        ]
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
    """Balance tokens over `count` batches of at most `size` rows: the longest row first, to the batch with the fewest tokens.

    This is longest-processing-time scheduling (Graham 1969, SIAM J. Appl. Math. 17:416-429) with a maximum number of rows.
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


def _group_by_length(rows: Rows, lengths: NDArray[np.int64], tokens: int) -> list[Rows]:
    """Batches of rows of similar length, with as many rows as fit if all are padded to the longest."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens // int(lengths[order[start]]))
        batches.append(rows[order[start : start + size]])
        start += size
    return batches


def _split_largest(batches: list[Rows], count: int) -> list[Rows]:
    """Increase the number of batches to `count` by halving those with the most rows; batches of one row leave empty ones."""
    batches = list(batches)
    largest = [(-len(batch), index) for index, batch in enumerate(batches)]
    heapify(largest)
    for new in range(len(batches), count):
        negative_size, old = largest[0]
        half = (1 - negative_size) // 2
        batches.append(batches[old][half:])
        batches[old] = batches[old][:half]
        heapreplace(largest, (-half, old))
        heappush(largest, (half + negative_size, new))
    return batches


def _permutation(count: int, seed: int) -> Rows:
    order: Rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return order
