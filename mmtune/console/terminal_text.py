"""Text on the terminal: control characters from data, models and servers are escaped, and closed outputs are handled."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

# C0 without tab and newline, DEL, C1, bidirectional overrides and isolates, and surrogates, which cannot be encoded.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CURSOR = re.compile("(\n|\x1b\\[A)*")
"""The text that a progress bar writes to move to its line."""


def escape_controls(text: str) -> str:
    r"""Replace every control character except tab and newline by `\uXXXX`.

    This is the notation of JSON, so a JSON document stays valid and keeps its values.
    """
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class OutputFailed(Exception):
    """Standard output or standard error cannot be written.

    Args:
        error: of the system.
        name: of the stream, for messages.
        descriptor: of the stream.
    """

    def __init__(self, error: OSError, name: str, descriptor: int) -> None:
        super().__init__(f"cannot write to {name}: {error.strerror}")
        self.is_closed_pipe = isinstance(error, BrokenPipeError)
        self._descriptor = descriptor

    def discard(self) -> None:
        """Discard the buffered text of the stream. Python would write it at exit and fail again."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)


class GuardedStream:
    """A text stream that raises OutputFailed on errors and escapes characters that its encoding does not have.

    Args:
        stream: the stream to write to.
        name: of the stream, for messages.

    Raises:
        OutputFailed: from `write` and `flush`, for example if the reader of a pipe has exited or the disk is full.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream = stream
        self.title = name

    def write(self, text: str) -> int:
        shown = text
        if not supports_unicode(self.stream):
            shown = shown.encode(self.stream.encoding, "backslashreplace").decode(self.stream.encoding)
        try:
            self.stream.write(shown)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Continue without a closed terminal, since SIGHUP decides whether the command ends. Any other error counts."""
        failed = OutputFailed(error, self.title, self.stream.fileno())
        if error.errno != errno.EIO or not stat.S_ISCHR(os.fstat(self.stream.fileno()).st_mode):
            raise failed from error
        failed.discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class EscapedStream(GuardedStream):
    """A guarded stream that escapes control characters in everything written to it.

    Code that writes its own terminal sequences uses `unescaped`.

    Args:
        stream, name: as for `GuardedStream`.
        shows_progress: whether progress bars are written to it, which begin with a carriage return or move between lines.
    """

    def __init__(self, stream: TextIO, name: str, shows_progress: bool = False) -> None:
        super().__init__(stream, name)
        self._shows_progress = shows_progress

    def write(self, text: str) -> int:
        start = ""
        if self._shows_progress:
            start = text if CURSOR.fullmatch(text) else "\r" * text.startswith("\r")
        super().write(start + escape_controls(text[len(start) :]))
        return len(text)


def supports_unicode(stream: Any) -> bool:
    """Whether the encoding of a stream supports all of Unicode. If not, JSON is written in ASCII."""
    return str(stream.encoding or "utf-8").lower().startswith("utf")


def unescaped(stream: Any) -> Any:
    """The stream of an `EscapedStream` without escaping, for terminal sequences; any other stream unchanged."""
    return GuardedStream(stream.stream, stream.title) if isinstance(stream, EscapedStream) else stream


def escape_output(run: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command so that its standard output and standard error are escaped, and errors in writing them stop it.

    The exit code is then 141 if the reader of a pipe has exited (128 + SIGPIPE), otherwise 2.
    """

    @functools.wraps(run)
    def escaped(*args: Any, **kwargs: Any) -> int:
        with _escaped_streams():
            try:
                code = run(*args, **kwargs)
                sys.stdout.flush()
            except OutputFailed as error:
                error.discard()
                if error.is_closed_pipe:
                    return 128 + signal.SIGPIPE
                print(f"error: {error}", file=sys.stderr)
                return 2
        return code

    return escaped


@contextmanager
def _escaped_streams() -> Iterator[None]:
    with Path(os.devnull).open("w", encoding="utf-8") as null:  # for streams that are closed at the start (`>&-`)
        out: Any = EscapedStream(sys.stdout or null, "standard output")
        err: Any = EscapedStream(sys.stderr or null, "standard error", shows_progress=True)
        with redirect_stdout(out), redirect_stderr(err):
            yield
