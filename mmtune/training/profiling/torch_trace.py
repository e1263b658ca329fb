"""Chrome trace of torch.profiler: its collectives and operators, and the trace file with mmtune's own lanes."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.data.time_spans import TimeSpan, WorkerSpans
from mmtune.training.profiling.step_parts import PARTS, Interval, Segment, subtract, union
from mmtune.utils.files import replace_bytes

FIRST_LANE = 10**9
"""Process number of the first of mmtune's lanes in a trace: above those of processes and GPUs."""
COLLECTIVE = re.compile(r"(gloo|mpi|ucc|xccl|hccl):")
"""Names of the spans that torch's backends record on their own threads. NCCL's collectives are GPU kernels."""
LAUNCH_NS = 100_000
"""A shorter time between two operations of a process is no wait: its host prepares the second."""
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class DeviceWork:
    """What a process's device did while torch.profiler ran, in nanoseconds of `time.perf_counter_ns`.

    Attributes:
        collectives: every collective in the order of their starts, each from when this process is ready for it until its end.
        busy: the time in which anything else ran: GPU kernels and copies, or operators on the CPU. Disjoint, in order.
    """

    collectives: list[Interval]
    busy: list[Interval]

    def exposed(self, others: Sequence[Interval]) -> tuple[list[Interval], list[Interval]]:
        """The time in which this process only waited for collectives.

        Args:
            others: for each collective, the part of it in which another process was not ready.

        Returns:
            Communication, and the wait for other processes; both disjoint and in order.
        """
        waits = subtract(union(others), self.busy)
        return subtract(subtract(union(self.collectives), self.busy), waits), waits

    def during(self, start: int, end: int) -> list[Interval]:
        """The collectives that start in a span of time."""
        return [each for each in self.collectives if start <= each[0] < end]


def wait_for_others(collectives: Sequence[Interval], durations: Sequence[Sequence[int]]) -> list[Interval] | None:
    """The part of each collective in which another process was not ready for it.

    The process that is ready last waits for none, so its duration, the shortest of all, is that of the transfer. No clock is
    compared between processes.

    Args:
        collectives: those of this process.
        durations: by process, the nanoseconds of every collective in the same order.

    Returns:
        An interval for each collective; None if the processes do not have the same number of collectives.
    """
    if any(len(each) != len(collectives) for each in durations):
        return None
    shortest = map(min, zip(*durations, strict=True))
    return [(start, end - transfer) for (start, end), transfer in zip(collectives, shortest, strict=True)]


def clock_offset(events: Sequence[dict[str, Any]], marks: dict[str, int]) -> int:
    """Nanoseconds to add to a time of the trace to get one of `time.perf_counter_ns`.

    Args:
        events: of the trace, with a span for every mark.
        marks: when each of these spans was entered, by its name.
    """
    return max(marks[event["name"]] - _ns(event["ts"]) for event in _step_marks(events, marks))


def device_work(events: Sequence[dict[str, Any]], marks: dict[str, int], on_gpu: bool) -> DeviceWork:
    """The work of the device, from the events of a trace; arguments as `clock_offset`."""
    offset = clock_offset(events, marks)
    thread = next(iter(_step_marks(events, marks)))["tid"]
    collectives: list[Interval] = []
    busy: list[Interval] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        name, category, start = event["name"], event.get("cat"), _ns(event["ts"]) + offset
        span = (start, start + _ns(event["dur"]))
        if on_gpu and category in GPU_WORK:
            (collectives if "nccl" in name.lower() else busy).append(span)
        elif not on_gpu and COLLECTIVE.match(name):
            collectives.append(span)
        elif not on_gpu and category == "cpu_op" and event["tid"] == thread and not name.startswith("c10d::"):
            busy.append(span)
    return DeviceWork(sorted(collectives), union(busy, gap=LAUNCH_NS))


def write_trace(
    path: Path,
    trace: dict[str, Any],
    offset: int,
    segments_by_rank: Sequence[Sequence[Segment]],
    batches: Sequence[WorkerSpans],
) -> None:
    """Write a trace with lanes for the parts of the steps of every process, and for the loader's workers of this one.

    Args:
        path: the file, gzip-compressed JSON.
        trace: of torch.profiler.
        offset: `clock_offset` of its events.
        segments_by_rank: of every process, on the clock of this one.
        batches: of the workers.
    """
    lanes: list[tuple[int, str, str, Sequence[Segment | TimeSpan]]] = []
    for rank, segments in enumerate(segments_by_rank):
        lanes.append((rank, "mmtune: parts of a step", f"process {rank}", segments))
    for worker in sorted({batch.worker for batch in batches}):
        spans = [span for batch in batches if batch.worker == worker for span in batch.spans]
        lanes.append((worker, "mmtune: loader workers", f"worker {worker}", spans))
    events = [*trace["traceEvents"]]
    for thread, process, name, lane in lanes:
        where = {"pid": FIRST_LANE + ("workers" in process), "tid": thread}
        events.append({"ph": "M", "name": "process_name", **where, "args": {"name": process}})
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": name}})
        events += [
            {
                "ph": "X",
                "cat": "mmtune",
                "name": PARTS[span.part],
                "ts": (span.start - offset) / 1e3,
                "dur": (span.end - span.start) / 1e3,
                **where,
            }
            for span in lane
        ]
    replace_bytes(path, gzip.compress(json.dumps({**trace, "traceEvents": events}).encode(), compresslevel=5))


def _step_marks(events: Sequence[dict[str, Any]], marks: dict[str, int]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == "user_annotation" and event["name"] in marks]


def _ns(microseconds: float) -> int:
    return round(microseconds * 1e3)
