"""Timeline of one training step: which part the model, the loader or the optimizer is in, on the clock of the device.

On a GPU the host runs ahead of the device, so the boundaries between parts are CUDA events in the stream of the computation. They
are read after the step, and the step waits for the device only at its start and its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from mmtune.training.profiling.step_parts import Segment


class HostClock:
    """The clock of a computation on the CPU: nanoseconds of `time.perf_counter_ns`."""

    def start(self) -> None:
        """Begin a step."""

    def mark(self) -> Any:
        """A mark of the present moment."""
        return time.perf_counter_ns()

    def read(self, marks: Sequence[Any]) -> list[int]:
        """The marks of a step in nanoseconds of `time.perf_counter_ns`."""
        return list(marks)


class CudaClock(HostClock):
    """The clock of the current CUDA stream. A mark's moment is when the device has done the work that was submitted before it."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self._origin_ns = time.perf_counter_ns()
        self._origin = self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, marks: Sequence[torch.cuda.Event]) -> list[int]:
        torch.cuda.synchronize()
        return [self._origin_ns + round(self._origin.elapsed_time(mark) * 1e6) for mark in marks]


class StepTimeline:
    """The parts of one step in order; parts can be nested, and time belongs to the innermost.

    Args:
        clock: of the device that runs the model.
    """

    def __init__(self, clock: HostClock) -> None:
        self._clock = clock
        self._stack = ["other"]
        self._is_scored = False
        clock.start()
        self._marks: list[tuple[Any, str]] = [(clock.mark(), "other")]

    @property
    def in_backward(self) -> bool:
        """Whether the backward pass runs, in which activation checkpointing runs modules once more."""
        return "backward" in self._stack

    def push(self, part: str) -> None:
        """Enter a part."""
        self._stack.append(part)
        self._marks.append((self._clock.mark(), part))

    def pop(self) -> None:
        """Leave the innermost part. After the output head of a model has run, the rest of the forward pass is the loss."""
        self._stack.pop()
        if self._is_scored and len(self._stack) == 2:
            self._stack[1] = "loss"
        self._marks.append((self._clock.mark(), self._stack[-1]))

    def end_forward(self) -> None:
        """Leave the forward pass of a batch."""
        self._is_scored = False
        self.pop()

    def end_head(self) -> None:
        """Leave the output head."""
        self._is_scored = True
        self.pop()

    def finish(self) -> list[Segment]:
        """The segments of the step, from its start until now, without gaps."""
        marks, parts = zip(*self._marks, (self._clock.mark(), "other"), strict=True)
        times = self._clock.read(marks)
        return [Segment(*each) for each in zip(times, times[1:], parts, strict=False) if each[0] < each[1]]


def clock_of(device: torch.device) -> HostClock:
    """The clock of a device's computation."""
    return CudaClock() if device.type == "cuda" else HostClock()
