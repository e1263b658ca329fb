"""Streamed training data: read sequentially in every epoch, without an index, shuffled within a window.

Every process and every data-loader worker iterates over the same rows in the same order and parses only its own. So the order
does not depend on the number of processes, and the number of batches per process is enough to resume a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mmtune.utils.errors import UserError

LazySample = Callable[[], Any]
"""Returns the sample of a row when called; can raise RowError."""


class SampleStream(IterableDataset[Any]):
    """An endless stream of the batches of one process.

    Args:
        sources: for each source, a function from the epoch number to an iterator over its rows in order, as `LazySample`.
        weights: the proportion of each source in the samples.
        make_batch: makes a batch of a list of (source number, lazy sample); the list can be empty at the end of the data.
        seed: seed of the order.
        window: size of the shuffle window: number of rows of a source that are held in memory, unparsed, and shuffled.
        size: rows per batch.
        rank, world_size: rank of this process, and number of processes.
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
        """Start with the batch of this number; the rows of the batches before it are skipped without parsing."""
        self._first = batch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows_per_block = self._size * self._world_size
        rows = self._mixed_rows(self._first * rows_per_block)
        for block in itertools.count():
            try:
                samples = list(itertools.islice(rows, rows_per_block))
            except UserError as error:  # an error of the file, which is raised in the main process, not in a worker
                yield error
                return
            if block % workers == number:
                yield self._make_batch(samples[self._rank * self._size : (self._rank + 1) * self._size])

    def _mixed_rows(self, skip: int) -> Iterator[tuple[int, LazySample]]:
        """Rows of all sources from a position on; the next source is always the one furthest below its proportion."""
        turns = self._source_order()
        skipped = [0] * len(self._sources)
        for source in itertools.islice(turns, skip):
            skipped[source] += 1
        rows = [self._shuffled_rows(number, count) for number, count in enumerate(skipped)]
        for source in turns:
            yield source, next(rows[source])

    def _source_order(self) -> Iterator[int]:
        deficits = np.zeros(len(self._weights))
        while True:
            deficits += self._weights
            source = int(deficits.argmax())
            deficits[source] -= 1
            yield source

    def _shuffled_rows(self, source: int, skip: int) -> Iterator[LazySample]:
        """The rows of a source, epoch after epoch, shuffled within windows, from a position on."""
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
                raise UserError(f"data.train[{source}]: the stream has no rows")
