"""Locks on directories that one process at a time may write; the system releases them when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from mmtune.utils.errors import UserError

IS_HELD = (errno.EACCES, errno.EAGAIN)
HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _Held(Exception):
    """Another process holds a lock."""


def lock_file(directory: Path) -> Path:
    """The file beside a directory whose lock stands for it. It is there only while the lock is held, or after a kill."""
    directory = Path(os.path.abspath(directory))  # noqa: PTH100  (resolve would follow links)
    return directory.parent / f".{directory.name}.lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock, whether it exists or not; yields whether it is held.

    It is not where no lock can be made, as on some network file systems or where another user's killed process has left its file:
    a line says so, and two processes are then not told apart.

    Raises:
        UserError: another process holds it; its number and machine are named.
    """
    file = lock_file(directory)
    made: list[Path] = []
    try:
        made = [parent for parent in file.parents if not parent.exists()]
        descriptor = _lock(file)
    except _Held as error:
        raise UserError(f"{directory} is in use: {_holder(file)} writes it; wait for it, end it, or give another path") from error
    except OSError as error:
        if error.errno in HAS_NO_LOCKS or os.path.exists(file):  # noqa: PTH110  (another user's; Path's raises)
            print(f"{directory}: no lock, because {file} cannot be locked: {error.strerror}; let no second process write there")
        _remove_empty(made)
        descriptor = None  # where the directory itself cannot be written, whoever writes it says so
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)
            _remove_empty(made)


def _lock(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Of the process: flock's would stay with data-loader workers, which outlive a process that is killed.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(sys.argv)})".encode())
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in IS_HELD:
                raise _Held from error
            raise
        os.close(descriptor)  # its holder removed it in between


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with contextlib.suppress(OSError):  # something is in it by now
            folder.rmdir()
