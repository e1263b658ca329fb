"""Training rows as a stream: read once through per epoch, never indexed, shuffled within a window.

Every process and every data-loader worker goes through the same rows in the same order and parses only its own, so that
the order is one for every layout, and one number says where a run stands: how many batches each process has taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mmtune.utils.errors import UserError

LazySample = Callable[[], Any]
"""Gives a row's sample when called; may raise RowError."""


class SampleStream(IterableDataset[Any]):
    """One process's batches, without end.

    Args:
        sources: for each source, what opens it for the epoch with a number and gives its rows in order, each as a Handle.
        weights: the share of each source in the samples.
        make_batch: makes a batch of (source number, handle) pairs; of none where the last rows leave a process without.
        seed: of the order.
        window: how many rows of a source are shuffled among themselves, and held in memory unparsed.
        size: rows in a batch.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self,
        sources: Sequence[Callable[[int], Iterator[LazySample]]],
        weights: Sequence[float],
        make_batch: Callable[[list[tuple[int, LazySample]]], Any],
        *,
        seed: int,
        window: int,
        size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sources = list(sources)
        self._weights = np.array(weights, dtype=float) / sum(weights)
        self._make_batch = make_batch
        self._seed = seed
        self._window = window
        self._size = size
        self._rank, self._world_size = rank, world_size
        self._first = 0

    def start_at(self, batch: int) -> None:
        """Begin with a batch by its number, as if those before it had been taken; their rows are passed over unparsed."""
        self._first = batch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        every = self._size * self._world_size
        rows = self._mixed(self._first * every)
        for block in itertools.count():
            try:
                taken = list(itertools.islice(rows, every))
            except UserError as error:  # of the file: raised where the batch is taken, not in a worker
                yield error
                return
            if block % workers == number:
                yield self._make_batch(taken[self._rank * self._size : (self._rank + 1) * self._size])

    def _mixed(self, skip: int) -> Iterator[tuple[int, LazySample]]:
        """Rows of all sources from a position on, always from the source that is furthest behind its share."""
        turns = self._turns()
        taken = [0] * len(self._sources)
        for source in itertools.islice(turns, skip):
            taken[source] += 1
        rows = [self._shuffled(number, skipped) for number, skipped in enumerate(taken)]
        for source in turns:
            yield source, next(rows[source])

    def _turns(self) -> Iterator[int]:
        owed = np.zeros(len(self._weights))
        while True:
            owed += self._weights
            source = int(owed.argmax())
            owed[source] -= 1
            yield source

    def _shuffled(self, source: int, skip: int) -> Iterator[LazySample]:
        """A source's rows, epoch after epoch, from a position on."""
        for epoch in itertools.count():
            read = 0
            rows = self._sources[source](epoch)
            for number in itertools.count():
                window = list(itertools.islice(rows, self._window))
                if not window:
                    break
                read += len(window)
                if skip >= len(window):
                    skip -= len(window)
                    continue
                for index in np.random.default_rng((self._seed, source, epoch, number)).permutation(len(window))[skip:]:
                    yield window[index]
                skip = 0
            if read == 0:
                raise UserError(f"data.train[{source}]: the stream holds no rows")
