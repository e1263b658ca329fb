"""The error of a launched run: printed by one process, and left where the launcher's report takes the root cause from.

torch's elastic launcher, which torchrun and accelerate launch use, gives every process the path of a file for its error, and
prints its text when the run has failed. One machine's files are `…/LOCAL_RANK/error.json`; so a process can read the error of
the machine's first process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtune.console.library_output import rank_prefix
from mmtune.console.terminal_text import escape_controls

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
FIRST_S = 5.0
"""So long a process with an error waits for the machine's first process to find the same one."""
LAUNCHER_S = 5.0
"""So long a process that is not the root cause waits for the launcher to end it, which reports the first that ends by itself."""


def print_error(text: str) -> None:
    """Print the error that ends this process, unless the machine's first process ends with the same one."""
    if leave_error(text):
        print(f"{rank_prefix()}{text}", file=sys.stderr)


def leave_error(text: str, message: str | None = None) -> bool:
    """Leave an error for the launcher's report, unless the machine's first process has the same.

    Args:
        text: what the report shows.
        message: the error without its traceback, for schedulers that read the file; `text` by default.

    Returns:
        Whether this process is the one to print it.
    """
    file = _error_file()
    if file is None:
        return True
    text = escape_controls(text)
    first = file.parent.parent / "0" / file.name
    if file != first and _waits_for(first) and _text_of(first) == text:
        time.sleep(LAUNCHER_S)
        return False
    now = str(int(time.time()))  # torch takes the file with the lowest one as the root cause
    content = {
        "message": {"message": text if message is None else message, "extraInfo": {"py_callstack": text, "timestamp": now}}
    }
    written = file.with_suffix(".writing")
    written.write_text(json.dumps(content), encoding="utf-8")
    written.replace(file)  # others never read a part
    return True


def print_lost_peer() -> None:
    """Say that another process ended this one, where that one has left no error of its own, such as when memory ran out."""
    file = _error_file()
    if file is None or (file.parent.name == "0" and not any(file.parent.parent.glob(f"*/{file.name}"))):
        text = "aborted: another process of the run ended; see its error, or the launcher's root cause"
        print(f"{rank_prefix()}{text}", file=sys.stderr, flush=True)
    if file is not None:
        time.sleep(LAUNCHER_S)


@contextmanager
def leaves_bugs() -> Iterator[None]:
    """Inside, an unexpected exception is also written for the launcher's report; Python prints its traceback."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            if not leave_error(traceback.format_exc().strip(), f"{type(error).__name__}: {error}"):
                sys.excepthook = lambda *error: None
            elif rank_prefix():
                print(f"{rank_prefix()}failed:", file=sys.stderr)
        raise


def _error_file() -> Path | None:
    named = os.environ.get(ERROR_FILE)
    return Path(named) if named else None


def _waits_for(file: Path) -> bool:
    """Whether a file is there, or comes within `FIRST_S`."""
    until = time.monotonic() + FIRST_S
    while not file.is_file():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _text_of(file: Path) -> str:
    text: str = json.loads(file.read_text(encoding="utf-8"))["message"]["extraInfo"]["py_callstack"]
    return text
