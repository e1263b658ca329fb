"""Parallel map over rows in forked processes; preparation and failures of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmtune.console.library_output import shows_progress
from mmtune.data.message import RowError
from mmtune.utils.errors import UserError
from mmtune.utils.threads import core_share

CHUNK = 64
"""Rows per task of a process."""
NO_SHARED_MEMORY = re.compile(r"unable to \w+.*</torch_")
"""torch's message if a shared-memory file cannot be created, written or resized."""
SERIAL_ROWS = 256
"""Up to this number of rows are processed in the main process, because starting others takes longer."""

Indices = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]


def map_rows(
    function: Callable[[int], Any], rows: Indices, processes: int | None, description: str | None, chunk: int = CHUNK
) -> Generator[Any, None, None]:
    """Apply a function to rows in several processes, in order, with a progress bar on a terminal.

    If a process is killed, or none can be started, a line says so, and the rest is done in this process. Close the iterator to
    end the processes early.

    Args:
        function: from a row number to a result that can be sent between processes. If it raises a RowError, that is the result.
        rows: the row numbers.
        processes: number of worker processes; None for one per core (of its share, under a launcher), and none for few
            rows. Always none without fork.
        description: the label of the progress bar; None: no bar.
        chunk: rows per task of a process. Each process is at most one task ahead.

    Raises:
        UserError: any other user error of the function, which is not about a single row; or a process that crashed.
    """
    if processes is None:
        cores = core_share()
        processes = min(cores, -(-len(rows) // CHUNK)) if len(rows) > SERIAL_ROWS and cores > 1 else 0
    if sys.platform != "linux":  # a process that is not forked cannot get every function
        processes = 0
    disabled = description is None or not shows_progress()
    with tqdm(total=len(rows), desc=description, unit="row", disable=disabled, leave=False) as bar:
        done = 0
        if processes:
            for results in _mapped_tasks(function, rows, processes, chunk):
                bar.update(len(results))
                done += len(results)
                yield from map(_checked, results)
        for row in rows[done:]:
            result = _result(function, int(row))
            bar.update()
            yield _checked(result)


def _result(function: Callable[[int], Any], row: int) -> Any:
    try:
        return function(row)
    except UserError as error:
        return error


def _checked(result: Any) -> Any:
    if isinstance(result, UserError) and not isinstance(result, RowError):
        raise result
    return result


def _mapped_tasks(function: Callable[[int], Any], rows: Indices, processes: int, chunk: int) -> Iterator[list[Any]]:
    """The results of tasks in order, until all are done or a process is lost.

    Each process does every n-th task and writes the results to a pipe of its own, at which it waits. A data loader of torch would
    need shared memory and semaphores, and its handler for dead workers raises in whatever the main process does.
    """
    context = multiprocessing.get_context("fork")
    tasks = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
    workers: list[tuple[Any, Connection]] = []
    try:
        for number in range(min(processes, len(tasks))):
            try:
                receiver, sender = context.Pipe(duplex=False)
                worker = context.Process(target=_do_tasks, args=(sender, function, tasks[number::processes], number), daemon=True)
                worker.start()
            except OSError as error:
                print(f"warning: cannot start a worker process ({error.strerror}); all rows are done in one process")
                return
            sender.close()  # so that the end of the process is the end of the pipe
            workers.append((worker, receiver))
        for number, task in enumerate(tasks):
            worker, receiver = workers[number % processes]
            try:
                results = receiver.recv()
            except (EOFError, OSError):  # also in the middle of a message
                worker.join()
                _report_lost(worker.exitcode, task)
                return
            yield results
    finally:
        for worker, receiver in workers:
            worker.kill()
            worker.join()
            receiver.close()


def _do_tasks(sender: Connection, function: Callable[[int], Any], tasks: Sequence[Indices], number: int) -> None:
    """What a worker process does: send the results of its tasks. At a bug it ends, and the main process meets the same bug."""
    prepare_worker(number)
    torch.set_num_threads(1)  # the threads of the main process do not exist here
    for task in tasks:
        results = [_result(function, int(row)) for row in task]
        try:
            sender.send(results)
        except BrokenPipeError:  # the main process has ended
            return


def _report_lost(exit_code: int | None, task: Indices) -> None:
    """
    Raises:
        UserError: the process crashed, as the main process would at the same row.
    """
    name = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    if name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"):
        raise UserError(
            f"a worker process crashed ({name}) in one of the rows {int(task[0]):,} to {int(task[-1]):,}, counted from 0"
        )
    why = "probably the machine ran out of memory; " if name == "SIGKILL" else ""
    print(f"warning: a worker process ended ({name}); {why}the rest is done in one process")


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
