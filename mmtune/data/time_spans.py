"""Time spans of data preparation, recorded for the profile of a training step in the process that makes the batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info


class TimeSpan(NamedTuple):
    """A span of time with what was done in it.

    Attributes:
        start, end: nanoseconds of `time.perf_counter_ns`, whose clock all processes of a machine share.
    """

    part: str
    start: int
    end: int


class WorkerSpans(NamedTuple):
    """The time spans of a batch that a data-loader worker made, with the worker's number."""

    worker: int
    spans: list[TimeSpan]


class SpanLog:
    """Records time spans. The encoder and the collator of a run share one; every data-loader worker has a copy of it."""

    def __init__(self) -> None:
        self._spans: list[TimeSpan] = []
        self._closed = False

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Record the time of the block."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            if not self._closed:
                self._spans.append(TimeSpan(part, start, time.perf_counter_ns()))

    def take(self) -> list[TimeSpan]:
        """The time spans since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def close(self) -> None:
        """Record nothing more in this process."""
        self._closed = True
        self._spans.clear()


class TimedCollator:
    """A collator whose time is recorded. A batch that a data-loader worker made brings its time spans under `spans`.

    Args:
        collator: makes a batch of encoded rows.
        log: records the time, together with that of encoding.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]], log: SpanLog) -> None:
        self._collator = collator
        self._log = log

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        with self._log.span("preprocess"):
            batch = self._collator(items)
        worker = get_worker_info()
        return batch if worker is None else {**batch, "spans": WorkerSpans(worker.id, self._log.take())}
