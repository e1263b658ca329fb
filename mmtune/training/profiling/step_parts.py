"""Parts of a training step: segments of time, each with one part, so that the parts add up to the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def union(intervals: Sequence[Interval] | NDArray[np.int64], gap: int = 0) -> list[Interval]:
    """The time in any of the intervals, as disjoint intervals in order; those at most `gap` apart are joined.

    Args:
        intervals: in any order; as an array, of shape (intervals, 2).
    """
    spans = np.asarray(intervals, np.int64).reshape(-1, 2)
    spans = spans[spans[:, 0] < spans[:, 1]]
    spans = spans[spans[:, 0].argsort()]
    ends = np.maximum.accumulate(spans[:, 1])  # of all intervals so far
    first = np.append(True, spans[1:, 0] > ends[:-1] + gap)[: len(spans)]
    last = np.append(first[1:], True)[: len(spans)]
    return list(zip(spans[first, 0].tolist(), ends[last].tolist(), strict=True))


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


def split_communication(
    seconds: Mapping[str, float], traced: Sequence[Segment], communication: Sequence[Interval], wait: Sequence[Interval]
) -> dict[str, float]:
    """Take communication and the wait for other processes out of the seconds of the parts that contain them.

    Args:
        seconds: by part.
        traced: the same parts in steps of which the communication is known. Its share of a part there is its share in `seconds`.
        communication, wait: in the traced steps; both disjoint and in order.

    Returns:
        By part, with the same sum.
    """
    result = dict.fromkeys(PARTS, 0.0)
    for part, total in seconds.items():
        own = [segment for segment in traced if segment.part == part]
        measured = seconds_by_part(assign(assign(own, communication, "communication"), wait, "processes"))
        whole = sum(measured.values())
        for name, each in measured.items() if whole else [(part, 1.0)]:
            result[name] += total * each / (whole or 1.0)
    return result


def _overlapping(intervals: Sequence[Interval], start: int, end: int) -> Iterator[Interval]:
    index = bisect_right(intervals, start, key=lambda interval: interval[1])  # the first that ends after the start
    while index < len(intervals) and intervals[index][0] < end:
        yield intervals[index]
        index += 1
