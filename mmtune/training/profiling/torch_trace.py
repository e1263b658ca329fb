"""Chrome trace of torch.profiler: its collectives and operators, and the trace file with mmtune's own lanes."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mmtune.data.time_spans import TimeSpan, WorkerSpans
from mmtune.training.profiling.step_parts import PARTS, Interval, Segment, subtract, union

FIRST_LANE = 10**9
"""Process number of the first of mmtune's lanes in a trace: above those of processes and GPUs."""
COLLECTIVE = re.compile(r"(gloo|mpi|ucc|xccl|hccl):")
"""Names of the spans that torch's backends record on their own threads. NCCL's collectives are GPU kernels."""
LAUNCH_NS = 100_000
"""A shorter time between two operations of a process is no wait: its host prepares the second."""
EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
SEPARATOR = re.compile(r"[\s,]*")
CHUNK = 2**22
"""Characters of a trace that are read at once."""
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


NO_WORK = DeviceWork([], []), 0
"""What `read_device_work` would return of a process that was not traced."""


class IncompleteTraceError(Exception):
    """A trace file of torch.profiler that ends early."""


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


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace file, one after another: all of them would take several times the file's size in memory.

    Raises:
        IncompleteTraceError: the file ends early.
    """
    decoder, text, position = json.JSONDecoder(), "", 0
    with path.open(encoding="utf-8") as file:
        while not (start := EVENTS.search(text)):
            text += _chunk(file, path)
        position = start.end()
        while True:
            position = SEPARATOR.match(text, position).end()  # type: ignore[union-attr]  # it matches an empty text
            if text[position : position + 1] == "]":
                return
            try:
                event, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError:  # its end is not read yet
                text, position = text[position:] + _chunk(file, path), 0
            else:
                yield event


def _chunk(file: TextIO, path: Path) -> str:
    if chunk := file.read(CHUNK):
        return chunk
    raise IncompleteTraceError(path)


def read_device_work(path: Path, marks: Mapping[str, int], on_gpu: bool) -> tuple[DeviceWork, int]:
    """Read the work of the device from a trace file.

    Args:
        marks: for every step, the name of its span in the trace, and when it was entered (`time.perf_counter_ns`).

    Returns:
        The work, and the nanoseconds to add to a time of the trace to get one of `time.perf_counter_ns`.
    """
    collectives: list[Interval] = []
    work: dict[Any, array[int]] = {}  # by thread: start, end, start, end, ...
    offsets, own_thread = [], None
    for event in read_events(path):
        if event.get("ph") != "X":
            continue
        name, category, thread, start = event["name"], event.get("cat"), event["tid"], _ns(event["ts"])
        span = (start, start + _ns(event["dur"]))
        if category == "user_annotation" and name in marks:
            own_thread = thread
            offsets.append(marks[name] - start)  # the span begins right after its mark
        elif (on_gpu and category == "kernel" and "nccl" in name.lower()) or (not on_gpu and COLLECTIVE.match(name)):
            collectives.append(span)
        elif (on_gpu and category in GPU_WORK) or (not on_gpu and category == "cpu_op" and not name.startswith("c10d::")):
            work.setdefault("gpu" if on_gpu else thread, array("q")).extend(span)
    offset = max(offsets)
    busy = np.array(work.get("gpu" if on_gpu else own_thread, array("q"))).reshape(-1, 2) + offset
    return DeviceWork(sorted((start + offset, end + offset) for start, end in collectives), union(busy, LAUNCH_NS)), offset


def write_trace(
    path: Path,
    torch_trace: Path,
    offset: int,
    segments_by_rank: Sequence[Sequence[Segment]],
    batches: Sequence[WorkerSpans],
) -> None:
    """Write a trace with lanes for the parts of the steps of every process, and for the loader's workers of this one.

    Args:
        path: the file, gzip-compressed JSON.
        torch_trace: the file of torch.profiler.
        offset: as `read_device_work` returns it.
        segments_by_rank: of every process, on the clock of this one.
        batches: of the workers.
    """
    lanes = [*_lanes(offset, segments_by_rank, batches)]
    temporary = path.with_name(f".{path.name}")
    try:
        with torch_trace.open(encoding="utf-8") as file, gzip.open(temporary, "wt", compresslevel=3, encoding="utf-8") as out:
            text = _chunk(file, torch_trace)
            while not (start := EVENTS.search(text)):
                text += _chunk(file, torch_trace)
            out.write(f"{text[: start.end()]}{json.dumps(lanes)[1:-1]},{text[start.end() :]}")
            shutil.copyfileobj(file, out, CHUNK)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _lanes(
    offset: int, segments_by_rank: Sequence[Sequence[Segment]], batches: Sequence[WorkerSpans]
) -> Iterator[dict[str, Any]]:
    lanes: list[tuple[int, str, str, Sequence[Segment | TimeSpan]]] = []
    for rank, segments in enumerate(segments_by_rank):
        lanes.append((rank, "mmtune: parts of a step", f"process {rank}", segments))
    for worker in sorted({batch.worker for batch in batches}):
        spans = [span for batch in batches if batch.worker == worker for span in batch.spans]
        lanes.append((worker, "mmtune: loader workers", f"worker {worker}", spans))
    for thread, process, name, lane in lanes:
        where = {"pid": FIRST_LANE + ("workers" in process), "tid": thread}
        yield {"ph": "M", "name": "process_name", **where, "args": {"name": process}}
        yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
        for span in lane:
            times = {"ts": (span.start - offset) / 1e3, "dur": (span.end - span.start) / 1e3}
            yield {"ph": "X", "cat": "mmtune", "name": PARTS[span.part], **times, **where}


def _ns(microseconds: float) -> int:
    return round(microseconds * 1e3)
