"""Progress of an evaluation: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from mmtune.console.library_output import shows_progress

EVERY_S = 30.0
"""Where there is no terminal, a line is written so often at most."""
BAR = "{desc}: {n_fmt} of {total_fmt} {unit} |{bar:6}| {remaining} left"


class EvaluationProgress:
    """Shows how many questions a model has answered, of how many, and the time that is left; used as a context manager.

    On a terminal it is a bar, which goes when the work ends. Elsewhere a line is written every `EVERY_S`, and a first one as soon
    as it is known that the work takes longer than that; short work writes none.

    Args:
        what: is evaluated, for the reader.
        total: how many questions there are.
        unit: what is counted.
        clock: gives the seconds.
    """

    def __init__(self, what: str, total: int, unit: str = "questions", clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._done = 0
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> EvaluationProgress:
        self._start = self._last = self._clock()
        if shows_progress():
            self._bar = tqdm(total=self._total, desc=self._what, unit=self._unit, bar_format=BAR, leave=False, dynamic_ncols=True)
        return self

    def update(self, count: int) -> None:
        """Count questions that are answered."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = self._clock()
        left = (now - self._start) / self._done * (self._total - self._done)
        if left > 0 and (now - self._last >= EVERY_S or (self._done == count and left >= EVERY_S)):
            self._last = now
            print(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, about {tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
