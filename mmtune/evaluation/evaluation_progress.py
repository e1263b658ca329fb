"""Progress of an evaluation: a bar on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from mmtune.console.library_output import shows_progress

EVERY_S = 30.0
"""Minimum seconds between two progress lines without a terminal."""
BAR = "{desc}: {n_fmt} of {total_fmt} {unit} |{bar:6}| {remaining} left"


class EvaluationProgress:
    """Context manager that shows the number of answered questions and the remaining time.

    On a terminal it shows a bar, which is removed at the end. Otherwise it prints a line every `EVERY_S` seconds, and the first
    one as soon as the estimated time exceeds `EVERY_S`; a shorter evaluation prints nothing.

    Args:
        label: what is evaluated.
        total: the number of questions.
        unit: the name of what is counted.
        clock: returns the time in seconds.
    """

    def __init__(self, label: str, total: int, unit: str = "questions", clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._unit, self._clock = label, total, unit, clock
        self._done = 0
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> EvaluationProgress:
        self._start = self._last = self._clock()
        if shows_progress():
            self._bar = tqdm(
                total=self._total, desc=self._label, unit=self._unit, bar_format=BAR, leave=False, dynamic_ncols=True
            )
        return self

    def skip(self, count: int) -> None:
        """Leave out `count` questions whose answers are known."""
        self._total -= count
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def update(self, count: int) -> None:
        """Add `count` answered questions."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = self._clock()
        left = (now - self._start) / self._done * (self._total - self._done)
        if left > 0 and (now - self._last >= EVERY_S or (self._done == count and left >= EVERY_S)):
            self._last = now
            print(
                f"{self._label}: {self._done:,} of {self._total:,} {self._unit}, about {tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
