"""Work on rows in several processes."""

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
"""Rows that a process takes at a time."""
NO_SHARED_MEMORY = re.compile(r"unable to \w+.*</torch_")
"""torch's words where a file of shared memory cannot be made, written or given its size."""
FEW = 256
"""So few rows are worked on in this process: others would take longer to start."""

Indices = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]


class _Rows(torch.utils.data.Dataset[Any]):
    """What a function makes of rows, for a data loader's processes."""

    def __init__(self, work: Callable[[int], Any], rows: Indices) -> None:
        self._work, self._rows = work, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._work(int(self._rows[index]))
        except UserError as error:  # raised in a worker, it would come with that one's traceback as its message
            return error


def map_rows(work: Callable[[int], Any], rows: Indices, processes: int | None, what: str) -> Iterator[Any]:
    """What `work` makes of each row, in order, with a progress bar where somebody watches.

    Args:
        work: from a row's number to what can be sent between processes; the RowError that it raises is given for the row.
        rows: the rows' numbers.
        processes: beside this one; None takes one for each core that this one may use, and none for few rows.
        what: the bar's words.

    Raises:
        UserError: any other that `work` raises: the whole data set's, such as a processor that cannot be counted for.
    """
    if processes is None:
        cores = usable_cores()
        processes = min(cores, -(-len(rows) // CHUNK)) if len(rows) > FEW and cores > 1 else 0
    loader = torch.utils.data.DataLoader(
        _Rows(work, rows),
        batch_size=CHUNK,
        num_workers=processes,
        collate_fn=list,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a seed, and must not draw it from the run's
    )
    with tqdm(total=len(rows), desc=what, unit="row", disable=not shows_progress(), leave=False) as bar:
        for chunk in _handed_over(loader):
            bar.update(len(chunk))
            for result in chunk:
                if isinstance(result, UserError) and not isinstance(result, RowError):
                    raise result
                yield result


def _handed_over(loader: torch.utils.data.DataLoader[Any]) -> Iterator[list[Any]]:
    try:
        yield from loader
    except RuntimeError as error:
        if (reason := worker_failure(error)) is None:
            raise
        raise UserError(reason) from error


def worker_failure(error: RuntimeError) -> str | None:
    """Why a data loader's worker is gone or cannot hand over what it made, in one line; None for any other error.

    torch has no classes for these errors.
    """
    text = str(error)
    if "Bus error" in text or (NO_SHARED_MEMORY.search(text) and "Too many open files" not in text):
        last = text.strip().splitlines()[-1].removeprefix("RuntimeError: ")
        return (
            f"{last.rstrip('. ')}: the shared memory (/dev/shm) in which a worker hands over its batch is full; enlarge it, as "
            "with docker run --shm-size 8g, or work without workers (train.dataloader_num_workers: 0)"
        )
    if text.startswith("DataLoader worker"):
        return (
            f"{text.rstrip('. ')}: most likely the machine ran out of memory; lower train.dataloader_num_workers, "
            "train.dataloader_prefetch_factor or the rows in a batch"
        )
    return None


def prepare_worker(worker: int) -> None:
    """No word of the tokenizer's about having been forked; and signals are left to the process that this one works for.

    Ctrl-C, torchrun and schedulers send them to all processes of a run. It finishes its step by its workers, which end with it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
