"""CPU wait: the time that threads of this process were ready to run but had no core, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


class CpuWait:
    """Reads the run-queue delay of every thread from `/proc`.

    A thread that sleeps, waits for data or waits for another thread does not count. Time in which the quota of the control group
    is used up counts. Worker processes of a data loader do not count: their delay shows as `data_wait`.

    Args:
        tasks: the folder with one folder per thread.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._before = self._delays()

    def take(self) -> float | None:
        """Seconds that the longest waiting thread has waited since the last call; None if the kernel does not count them."""
        delays = self._delays()
        waits = [delay - self._before.get(thread, 0) for thread, delay in delays.items()]
        self._before = delays
        return max(waits) / 1e9 if waits else None

    def _delays(self) -> dict[str, int]:
        """Nanoseconds on a run queue by thread: the second field of `schedstat`."""
        delays = {}
        for file in self._tasks.glob("*/schedstat"):
            try:
                delays[file.parent.name] = int(file.read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # the thread has ended
                continue
        return delays
