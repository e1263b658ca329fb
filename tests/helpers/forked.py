"""Processes that start quickly: forked from a fork server that has already imported what a run needs."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(["tests.helpers.preloaded"])  # the server starts in the working directory, the project's root


def settle(log: Path) -> None:
    """As the first thing in such a process: what it prints goes to a file, and what it starts is started as anywhere on Linux."""
    for leaked in ("CC", "CXX"):  # by PEFT where BOFT's CUDA code does not compile; DeepSpeed's would be compiled again for them
        os.environ.pop(leaked, None)
    multiprocessing.set_start_method("fork", force=True)
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)


def command_line(arguments: list[str], log: Path) -> ForkServerProcess:
    """Start `mmtune ARGUMENTS`, as the first of a process group; what it prints goes to a file."""
    log.write_text("")
    process = forking.Process(target=_command_line, args=(arguments, log))
    process.start()
    return process


def _command_line(arguments: list[str], log: Path) -> None:
    from mmtune.cli.main import entry_point

    settle(log)
    os.setpgid(0, 0)
    sys.exit(entry_point(arguments))
