"""Parallel map over rows, with the processes of a data loader; preparation and failures of worker processes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
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


def map_rows(function: Callable[[int], Any], rows: Indices, processes: int | None, description: str) -> Iterator[Any]:
    """Apply a function to rows in several processes, in order, with a progress bar on a terminal.

    Args:
        function: from a row number to a result that can be sent between processes. If it raises a RowError, that is the result.
        rows: the row numbers.
        processes: number of worker processes; None for one per usable core, and none for few rows.
        description: the label of the progress bar.

    Raises:
        UserError: any other user error of the function, which is not about a single row.
    """
    if processes is None:
        cores = usable_cores()
        processes = min(cores, -(-len(rows) // CHUNK)) if len(rows) > SERIAL_ROWS and cores > 1 else 0
    loader = torch.utils.data.DataLoader(
        _MappedRows(function, rows),
        batch_size=CHUNK,
        num_workers=processes,
        collate_fn=list,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a seed, and must not use the generator of the run
    )
    with tqdm(total=len(rows), desc=description, unit="row", disable=not shows_progress(), leave=False) as bar:
        for chunk in _iterate_chunks(loader):
            bar.update(len(chunk))
            for result in chunk:
                if isinstance(result, UserError) and not isinstance(result, RowError):
                    raise result
                yield result


def _iterate_chunks(loader: torch.utils.data.DataLoader[Any]) -> Iterator[list[Any]]:
    try:
        yield from loader
    except RuntimeError as error:
        if (reason := worker_failure(error)) is None:
            raise
        raise UserError(reason) from error


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
    if text.startswith("DataLoader worker"):
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
