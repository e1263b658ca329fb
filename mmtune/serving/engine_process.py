"""The process of an engine: started in a session of its own, waited for, and ended with all its children."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Thread
from typing import IO

import httpx2
import psutil

from mmtune.console.signals import ENDING
from mmtune.console.terminal_text import escape_controls
from mmtune.serving.engines import LOOPBACK
from mmtune.utils.errors import CheckFailed, UserError

POLL_S = 0.2
END_S = 10.0
"""How long an engine may take to end after each signal."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
KEPT_LINES = 200
"""Lines of an engine's output in which the reason of its end is searched."""
_ERROR = re.compile(r"\w*(?:Error|Exception): .+")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def free_port() -> int:
    """A port on loopback that no program uses at the moment."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


def check_port(port: int) -> None:
    """Check that an engine can listen on a port.

    Raises:
        UserError: another program uses it, or it must not be used.
    """
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: expected a number from 1 to 65535")
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError as error:
        reason = "another program uses it" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"--port {port}: {reason}; give another one, such as --port {free_port()}") from error


class EngineProcess:
    """A running engine.

    Args:
        command: the command that starts it.
        environment: variables of its process, beside those of this one.
        port: the port on which it will listen.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int) -> None:
        self.address = f"http://{LOOPBACK}:{port}"
        self._others = _running_children()
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        try:
            self._process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the engine and its children
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise UserError(f"the engine cannot be started: {command[0]}: {error.strerror}") from error
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._reader = Thread(target=self._copy_output, args=(self._output,), daemon=True)
        self._reader.start()

    def _copy_output(self, output: IO[bytes]) -> None:
        for line in output:
            text = escape_controls(line.decode("utf-8", "replace").rstrip().rpartition("\r")[2])  # of a progress bar the end
            if text:
                self._last_lines.append(text)
                with contextlib.suppress(OSError):  # nobody reads our output: the engine would block on its own
                    print(f"engine: {text}", file=sys.stderr, flush=True)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the engine answers on its port.

        Raises:
            CheckFailed: it ends before, or does not answer in time.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._check_running("before it answered")
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.address}/health", timeout=5.0, trust_env=False).status_code < 500:
                    self._check_running("before it answered")  # a program that took the port meanwhile may have answered
                    return
            if time.monotonic() > until:
                raise CheckFailed(
                    f"the engine does not answer at {self.address} after {timeout_s:g} s; a large model needs a longer --timeout"
                )
            time.sleep(POLL_S)

    def check_alive(self, when: str) -> None:
        """Check after a failed question that the engine still runs, and is not about to end.

        Raises:
            CheckFailed: it ended.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._check_running(when)

    def wait(self) -> None:
        """Wait until the engine ends by itself.

        Raises:
            CheckFailed: it ended.
        """
        while True:
            self._check_running("by itself", while_serving=True)
            time.sleep(POLL_S)

    def _check_running(self, when: str, while_serving: bool = False) -> None:
        if (status := self._process.poll()) is None:
            return
        self._reader.join(timeout=2.0)
        if status == -signal.SIGKILL:
            raise CheckFailed(f"the engine ended {when}, by SIGKILL: another program killed it, or the system ran out of memory")
        how = f"with exit code {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        raise CheckFailed(f"the engine ended {when}, {how}{self._reason(while_serving)}")

    def _reason(self, while_serving: bool) -> str:
        """The first error in the last lines, which later ones follow from; otherwise the last line.

        While it serves, earlier errors are those of requests, and the last line is the reason of its end.
        """
        errors = [match[0] for line in self._last_lines if (match := _ERROR.search(line))]
        if errors and not while_serving:
            return f"; its first error: {errors[0]}"
        return f"; its last line: {self._last_lines[-1]}" if self._last_lines else ""

    def end(self) -> None:
        """End the engine: SIGTERM and then SIGINT to its group, then SIGKILL to each process of it that still runs."""
        for number in SIGNALS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            if self._has_ended():
                break
        while left := _running_children() - self._others:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, END_S)
        self._process.wait()
        self._reader.join(timeout=2.0)
        if not self._reader.is_alive():
            self._output.close()

    def _has_ended(self) -> bool:
        """Whether all processes of the engine end in time."""
        until = time.monotonic() + END_S
        while time.monotonic() < until:
            self._process.poll()
            if not _running_children() - self._others:
                return True
            time.sleep(POLL_S / 4)
        return False


@contextlib.contextmanager
def running_engine(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[EngineProcess]:
    """Start an engine, and end it with all its processes when the block ends, for whatever reason.

    Workers of an engine whose main process was killed, and those in other process groups, become children of this process.
    """
    _adopt_orphans(True)
    try:
        process = EngineProcess(command, environment, port)
        try:
            yield process
        finally:
            _uninterrupted(process.end)
    finally:
        _adopt_orphans(False)


def _uninterrupted(end: Callable[[], None]) -> None:
    """Run a function to its end, ignoring further signals: they would leave processes."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        end()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _running_children() -> set[psutil.Process]:
    """The processes that this one started, and theirs, that still run."""
    running = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.add(process)
    return running


def _adopt_orphans(adopt: bool) -> None:
    """Let orphans below this process become its children (PR_SET_CHILD_SUBREAPER of prctl(2), Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def _end_with_parent() -> None:
    """Let the kernel end the engine when this process is killed and cannot do it (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
