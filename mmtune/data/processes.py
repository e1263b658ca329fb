"""Parallel map over rows, with the processes of a data loader; preparation and failures of worker processes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmtune.console.library_output import shows_progress
from mmtune.data.message import RowError
from mmtune.utils.errors import UserError
from mmtune.utils.threads import usable_cores

CHUNK = 64
"""Rows per task of a process."""
NO_SHARED_MEMORY = re.compile(r"unable to \w+.*</torch_")
"""torch's message if a shared-memory file cannot be created, written or resized."""
WORKER_DIED = "DataLoader worker"
"""The start of torch's message if a worker was killed."""
SERIAL_ROWS = 256
"""Up to this number of rows are processed in the main process, because starting others takes longer."""

Indices = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]


class _MappedRows(torch.utils.data.Dataset[Any]):
    """A data set that applies a function to row numbers."""

    def __init__(self, function: Callable[[int], Any], rows: Indices) -> None:
        self._function, self._rows = function, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._function(int(self._rows[index]))
        except UserError as error:  # an exception raised in a worker would have the traceback as its message
            return error


def map_rows(
    function: Callable[[int], Any],
    rows: Indices,
    processes: int | None,
    description: str | None,
    chunk: int = CHUNK,
    prefetched: int = 0,
) -> Generator[Any, None, None]:
    """Apply a function to rows in several processes, in order, with a progress bar on a terminal.

    If a process is killed, a line says so, and the rest is done in this process. Close the iterator to end the processes early.

    Args:
        function: from a row number to a result that can be sent between processes. If it raises a RowError, that is the result.
        rows: the row numbers.
        processes: number of worker processes; None for one per usable core, and none for few rows. Always none without fork.
        description: the label of the progress bar; None: no bar.
        chunk: rows per task of a process.
        prefetched: how many rows the processes work ahead of the iterator, at least; two tasks each are always assigned.

    Raises:
        UserError: any other user error of the function, which is not about a single row.
    """
    if processes is None:
        cores = usable_cores()
        processes = min(cores, -(-len(rows) // CHUNK)) if len(rows) > SERIAL_ROWS and cores > 1 else 0
    if sys.platform != "linux":  # a process that is not forked cannot get every function
        processes = 0
    disabled = description is None or not shows_progress()
    with tqdm(total=len(rows), desc=description, unit="row", disable=disabled, leave=False) as bar:
        for results in _mapped_chunks(_MappedRows(function, rows), processes, chunk, prefetched):
            bar.update(len(results))
            for result in results:
                if isinstance(result, UserError) and not isinstance(result, RowError):
                    raise result
                yield result


def _mapped_chunks(mapped: _MappedRows, processes: int, chunk: int, prefetched: int) -> Iterator[list[Any]]:
    tasks: list[Any] = [range(start, min(start + chunk, len(mapped))) for start in range(0, len(mapped), chunk)]
    done = 0
    if processes:
        loader = torch.utils.data.DataLoader(
            mapped,
            batch_sampler=tasks,
            num_workers=processes,
            prefetch_factor=max(2, -(-prefetched // (chunk * processes))),
            collate_fn=list,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # the loader draws a seed, and must not use the generator of the run
        )
        try:
            for results in loader:
                yield results
                done += 1
        except RuntimeError as error:
            if not str(error).startswith(WORKER_DIED):
                raise
            print(f"warning: {str(error).rstrip('. ')}: probably the machine ran out of memory; the rest runs in one process")
    for task in tasks[done:]:
        yield [mapped[index] for index in task]


def worker_failure(error: RuntimeError) -> str | None:
    """The message if a data-loader worker died or cannot return its batch; None for other errors.

    torch has no exception classes for these errors.
    """
    text = str(error)
    if "Bus error" in text or (NO_SHARED_MEMORY.search(text) and "Too many open files" not in text):
        last = text.strip().splitlines()[-1].removeprefix("RuntimeError: ")
        return (
            f"{last.rstrip('. ')}: the shared memory (/dev/shm) for the batches of workers is full; increase it, such as with "
            "docker run --shm-size 8g, or disable workers (train.dataloader_num_workers: 0)"
        )
    if text.startswith(WORKER_DIED):
        return (
            f"{text.rstrip('. ')}: the machine probably ran out of memory; lower train.dataloader_num_workers, "
            "train.dataloader_prefetch_factor or the batch size"
        )
    return None


def prepare_worker(worker: int) -> None:
    """Prepare a worker process: disable the tokenizer's fork warning, and ignore signals.

    Ctrl-C, torchrun and schedulers send signals to all processes of a run. The main process still needs its workers to finish its
    step, and ends them itself.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
