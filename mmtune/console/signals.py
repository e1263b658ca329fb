"""SIGTERM and SIGHUP stop a command like Ctrl-C: unfinished files are removed before it exits."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from mmtune.utils.errors import Terminated

ENDING = (signal.SIGTERM, signal.SIGHUP)


def exit_on_signals(run: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command so that SIGTERM and SIGHUP raise `Terminated` in it; its exit code is then 128 + the signal's number.

    Signals that are ignored, as under nohup, or that have another handler are not changed. Neither are the processes of a
    launched run, because Python runs no handler while a process waits for the others in a collective operation.
    """

    @functools.wraps(run)
    def ended(*args: Any, **kwargs: Any) -> int:
        if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return run(*args, **kwargs)
        numbers = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
        owner = os.getpid()

        def end(number: int, frame: object) -> None:
            for each in numbers:  # further signals must not interrupt the cleanup
                signal.signal(each, signal.SIG_IGN if os.getpid() == owner else signal.SIG_DFL)
            if os.getpid() != owner:  # a forked process has nothing to clean up
                signal.raise_signal(number)
            raise Terminated(number)

        for number in numbers:
            signal.signal(number, end)
        try:
            return run(*args, **kwargs)
        except Terminated as error:
            print(f"stopped: by {signal.Signals(error.number).name}", file=sys.stderr)
            return 128 + error.number
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)

    return ended
