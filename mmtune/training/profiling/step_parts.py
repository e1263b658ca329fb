"""Parts of a training step: segments of time, each with one part, so that the parts add up to the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

PARTS = {
    "decode": "decode images",
    "preprocess": "preprocess",
    "loader": "wait for the loader",
    "vision": "vision tower",
    "projector": "projector",
    "language": "language model",
    "compiled": "model, compiled",
    "frozen": "frozen models",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer",
    "communication": "communication",
    "processes": "wait for other processes",
    "other": "other",
}
"""The parts in the order of the table, with their names there."""

Interval = tuple[int, int]
"""Start and end in nanoseconds."""


class Segment(NamedTuple):
    """A span of time in nanoseconds that belongs to one part."""

    start: int
    end: int
    part: str


def union(intervals: Iterable[Interval], gap: int = 0) -> list[Interval]:
    """The time in any of the intervals, as disjoint intervals in order; those at most `gap` apart are joined."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif start < end:
            merged.append((start, end))
    return merged


def subtract(intervals: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """The time in `intervals` that is not in `removed`. Both are disjoint and in order."""
    left = []
    for start, end in intervals:
        for first, last in _overlapping(removed, start, end):
            if start < first:
                left.append((start, first))
            start = max(start, last)
        if start < end:
            left.append((start, end))
    return left


def assign(segments: Sequence[Segment], intervals: Sequence[Interval], part: str, within: str | None = None) -> list[Segment]:
    """Give the time of `intervals` another part.

    Args:
        segments: in order, without gaps.
        intervals: disjoint and in order; what lies outside the segments is ignored.
        within: change only segments of this part; None: all.

    Returns:
        Segments of the same total time, in order, without gaps.
    """
    result = []
    for segment in segments:
        start = segment.start
        for first, last in _overlapping(intervals, *segment[:2]) if within in (None, segment.part) else ():
            first, last = max(first, start), min(last, segment.end)
            if start < first:
                result.append(Segment(start, first, segment.part))
            result.append(Segment(first, last, part))
            start = last
        if start < segment.end:
            result.append(Segment(start, segment.end, segment.part))
    return result


def seconds_by_part(segments: Iterable[Segment]) -> dict[str, float]:
    """The seconds of every part; 0 for a part without a segment."""
    totals = dict.fromkeys(PARTS, 0)
    for start, end, part in segments:
        totals[part] += end - start
    return {part: total / 1e9 for part, total in totals.items()}


def _overlapping(intervals: Sequence[Interval], start: int, end: int) -> Iterator[Interval]:
    index = bisect_right(intervals, start, key=lambda interval: interval[1])  # the first that ends after the start
    while index < len(intervals) and intervals[index][0] < end:
        yield intervals[index]
        index += 1
