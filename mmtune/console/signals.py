"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it was writing is removed on the way out."""

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
    """Have a command end by `Terminated` where SIGTERM or SIGHUP would end the process at once; its exit code is 128 + signal.

    A signal that is ignored, as under nohup, or that somebody else handles is left alone. So are the processes of a launched run:
    one that waits for the others would not see its handler run.
    """

    @functools.wraps(run)
    def ended(*args: Any, **kwargs: Any) -> int:
        if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return run(*args, **kwargs)
        numbers = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
        owner = os.getpid()

        def end(number: int, frame: object) -> None:
            for each in numbers:  # once is enough, and the way out is not to be interrupted
                signal.signal(each, signal.SIG_IGN if os.getpid() == owner else signal.SIG_DFL)
            if os.getpid() != owner:  # forked, with nothing of its own to remove
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
