"""Locks on directories that only one process may write. The system releases them when the process ends, also after a kill."""

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


class _LockHeldError(Exception):
    """Another process holds a lock."""


def lock_file(directory: Path) -> Path:
    """The lock file of a directory, beside it. It exists only while the lock is held, or after a kill."""
    directory = Path(os.path.abspath(directory))  # noqa: PTH100  (resolve would follow links)
    return directory.parent / f".{directory.name}.lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory, which may not exist yet. Yields whether the lock is held.

    Some network file systems have no locks, and a killed process of another user may have left its lock file. Then a line is
    printed, and other processes are not locked out.

    Raises:
        UserError: another process holds the lock; with its process id and machine.
    """
    file = lock_file(directory)
    created: list[Path] = []
    try:
        created = [parent for parent in file.parents if not parent.exists()]
        descriptor = _lock(file)
    except _LockHeldError as error:
        raise UserError(f"{directory} is in use by {_holder(file)}; wait until it ends, stop it, or give another path") from error
    except OSError as error:
        if error.errno in HAS_NO_LOCKS or os.path.exists(file):  # noqa: PTH110  (Path.exists raises for files of another user)
            print(f"{directory}: not locked: {file}: {error.strerror}; do not start a second process that writes there")
        _remove_empty(created)
        descriptor = None  # a directory that cannot be written is reported where it is written
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)
            _remove_empty(created)


def _lock(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A lock of the process: that of flock would be kept by data-loader workers, which outlive a killed process.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(sys.argv)})".encode())
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in IS_HELD:
                raise _LockHeldError from error
            raise
        os.close(descriptor)  # the holder removed it in the meantime


def lock_holder(directory: Path) -> str | None:
    """The other process that holds the lock of a directory, with its command; None without one.

    The lock of this process would be released: a process that holds it must not ask.
    """
    file = lock_file(directory)
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _holder(file) if error.errno in IS_HELD else None
    finally:
        os.close(descriptor)
    return None


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError):  # the holder has just removed it, or not yet written it
        if text := file.read_text(encoding="utf-8", errors="replace"):
            return text
    return "another process"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with contextlib.suppress(OSError):  # no longer empty
            folder.rmdir()
