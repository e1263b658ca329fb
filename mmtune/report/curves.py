"""Curves of a run: the numbers of `metrics.jsonl` by name, read as the file grows and reduced to a bounded number of points."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

BUCKETS = 256
"""A curve has at most two points for each: the lowest and the highest of the steps that it covers."""

LARGEST = 1e300
"""A value that is not smaller has no place on an axis."""

Point = tuple[float, float]


class Curve:
    """The values of one metric by step. Up to 512 are all points, then the lowest and the highest of equally many logs.

    The points depend on the values alone, not on when they are read, and a spike of one step stays visible.
    """

    def __init__(self) -> None:
        self._width = 1  # logs in a full bucket
        self._filled = 0  # logs in the last bucket
        self._buckets: list[tuple[Point, Point]] = []  # the lowest and the highest point
        self._last: Point | None = None

    def add(self, step: float, value: float) -> None:
        """Add the value of a later step."""
        self._last = point = (step, value)
        if self._buckets and self._filled < self._width:
            self._buckets[-1] = _merged(self._buckets[-1], (point, point))
            self._filled += 1
            return
        if len(self._buckets) == BUCKETS:
            self._buckets = [_merged(*self._buckets[at : at + 2]) for at in range(0, BUCKETS, 2)]
            self._width *= 2
        self._buckets.append((point, point))
        self._filled = 1

    def points(self) -> list[Point]:
        """The points by step; the last one is that of the last log."""
        points = {point for bucket in self._buckets for point in bucket} | {self._last}
        return sorted(point for point in points if point is not None)


def _merged(first: tuple[Point, Point], second: tuple[Point, Point]) -> tuple[Point, Point]:
    value = _value_of
    return min(first[0], second[0], key=value), max(first[1], second[1], key=value)


def _value_of(point: Point) -> float:
    return point[1]


class RunCurves:
    """All curves of a run. `update` reads only the lines that were added to the file since it was called last.

    Attributes:
        curves: by the name of the metric.
        last: the last value of each key, also of those that are not finite numbers.
        step: the last logged step; 0 before the first.
        damaged: lines that are no JSON object with a step, which are left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clear()

    def _clear(self) -> None:
        self._offset = 0
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, Any] = {}
        self.step = 0
        self.damaged = 0

    def update(self) -> RunCurves:
        """Read the new lines; a line that is not yet complete is read at the next call."""
        if not self._path.is_file():
            return self
        if self._path.stat().st_size < self._offset:  # a resumed run has cut the file
            self._clear()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._add(line)
        return self

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged += 1
            return
        self.step = max(self.step, step)
        for name, value in record.items():
            self.last[name] = value
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < LARGEST:
                self.curves.setdefault(name, Curve()).add(step, value)
