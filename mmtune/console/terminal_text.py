"""Text on the terminal: control characters from data, models and servers are shown escaped, and a closed output is reported."""

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

# C0 without tab and newline, DEL, C1, the bidirectional overrides and isolates, and surrogates, which no encoding takes.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CURSOR = re.compile("(\n|\x1b\\[A)*")
"""What a progress bar writes to move to its line."""


def escape_controls(text: str) -> str:
    r"""Text in which every control character but tab and newline is written as `\uXXXX`.

    The form is JSON's, so that a JSON document stays one and keeps its values.
    """
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class OutputFailed(Exception):
    """Standard output or standard error cannot be written.

    Args:
        error: the system's.
        name: of the stream, for people.
        descriptor: the stream's.
    """

    def __init__(self, error: OSError, name: str, descriptor: int) -> None:
        super().__init__(f"cannot write to {name}: {error.strerror}")
        self.is_closed_pipe = isinstance(error, BrokenPipeError)
        self._descriptor = descriptor

    def discard(self) -> None:
        """Send what the stream still buffers nowhere: Python writes it when it ends, and would fail again."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)


class GuardedStream:
    """A text stream whose failure has a name of its own; characters that its encoding lacks are escaped.

    Args:
        stream: where the text goes.
        name: of the stream, for people.

    Raises:
        OutputFailed: from `write` and `flush`, such as when the reader of a pipe is gone or a disk is full.
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
    """A guarded stream that escapes control characters in all that is written to it.

    Whoever writes terminal sequences of its own takes `unescaped`.

    Args:
        stream, name: as for `GuardedStream`.
        shows_progress: whether progress bars are written here: they begin with a carriage return, or move between lines.
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
    """Whether a stream's encoding has every character; otherwise the writer of a JSON document escapes those beyond ASCII."""
    return str(stream.encoding or "utf-8").lower().startswith("utf")


def unescaped(stream: Any) -> Any:
    """An `EscapedStream` without the escaping, for those who write terminal sequences of their own; any other stream as it is."""
    return GuardedStream(stream.stream, stream.title) if isinstance(stream, EscapedStream) else stream


def escape_output(run: Callable[..., int]) -> Callable[..., int]:
    """Have a command's standard output and standard error escaped while it runs; one that cannot be written ends it.

    The exit code is then 141 when the reader of a pipe is gone, as of any program in a shell, and otherwise 2.
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
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:  # for streams that were closed before (`>&-`)
        out: Any = EscapedStream(sys.stdout or nowhere, "standard output")
        err: Any = EscapedStream(sys.stderr or nowhere, "standard error", shows_progress=True)
        with redirect_stdout(out), redirect_stderr(err):
            yield
