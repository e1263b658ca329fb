"""The report of a run that trains: written again at most every ten seconds, and seldom enough to cost 1% of the time."""

from __future__ import annotations

import time
from typing import Any

from mmtune.recipe.recipe import Recipe
from mmtune.report.curves import RunCurves
from mmtune.report.run_report import RunState, base_scores, write_report
from mmtune.run_directory import RunDirectory

INTERVAL_S = 10.0
"""Seconds between two writes, at least."""
MAX_SHARE = 0.01
"""The largest share of the time that writing may take."""


class LiveReport:
    """Writes `report.html` of a run that this process trains. Only its main process has one.

    Args:
        run: the run directory.
        recipe: of the run.
    """

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        self._run = run
        self._recipe = recipe
        self._curves = RunCurves(run.metrics)
        self._base: dict[str, Any] | None = None
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since the last write."""
        return time.monotonic() >= self._next

    def write(self, text: str) -> None:
        """Write the page now.

        Args:
            text: a sentence on what the run does.

        Raises:
            UserError: the disk is full or failing.
        """
        start = time.monotonic()
        if not self._next:  # the first time
            self._base = base_scores(self._run)
        write_report(self._run, self._recipe, RunState("running", text), curves=self._curves, base=self._base)
        end = time.monotonic()
        self._next = end + max(INTERVAL_S, (end - start) / MAX_SHARE)
