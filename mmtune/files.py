"""Files and directories that are written whole or not at all, and where a user's cache is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmtune.errors import UserError

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, `path` is written.

    Raises:
        UserError: the disk is full, failing or read-only, or a quota or a limit is reached.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _fault_of_disk(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


def _fault_of_disk(error: Exception) -> str | None:
    """What an error says that the disk is to blame for. safetensors quotes the system's words; torch says only where it was."""
    said = str(error)
    if isinstance(error, RuntimeError) and "inline_container.cc" in said:
        return "the file was cut short, as on a full disk"
    return said if any(os.strerror(number) in said for number in DISK_FAULTS) else None


def flush(folder: Path) -> None:
    """Have a folder and all in it reach the disk, so that it is there after the machine has crashed too."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, key: str) -> None:
    """
    Args:
        folder: where something will be written later on.
        key: of the recipe, for the message.

    Raises:
        UserError: no file can be made in a folder, or in the nearest one above it that exists.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write in {place}: {error.strerror}") from error


def user_cache(kind: str) -> Path:
    """Where a user's files of one kind are kept between runs: `~/.cache/mmtune/KIND`."""
    return Path.home() / ".cache" / "mmtune" / kind


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader sees the old text or the new one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """As `replace_text`, for bytes; several threads or processes may write the same file, and the last one stays."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def expand_user(path: str) -> str:
    """A path with a leading `~` replaced by the home directory, as a shell does it; any other text as it is."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user: nothing is found at the path as it stands, and that is said
        return path


def check_replaceable(out: Path, overwrite: bool, mark: str, keep: Sequence[Path] = ()) -> None:
    """Refuse a destination that must not be written.

    Args:
        out: where a directory will go.
        overwrite: whether an earlier one may be replaced.
        mark: the file by which an earlier one is known; any other directory with something in it is left alone.
        keep: paths that are needed still, and so must not be at `out` or in it.

    Raises:
        UserError: with the reason.
    """
    if not out.exists():
        return
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out} holds {path}, which is needed; give another path")
    if not overwrite:
        raise UserError(f"{out} exists; give another path, or --overwrite to replace it")
    if not out.is_dir() or (not (out / mark).is_file() and any(out.iterdir())):
        raise UserError(f"{out} is not what would be written there (it has no {mark}), so --overwrite leaves it alone")


@contextlib.contextmanager
def replaced_directory(out: Path, overwrite: bool, mark: str, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block ends well, and goes when it does not.

    The arguments are those of `check_replaceable`. What was at `out` stays whole until then, and comes back if the
    renaming fails.

    Raises:
        UserError: as `check_replaceable`; or the directory beside `out` cannot be made.
    """
    check_replaceable(out, overwrite, mark, keep)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        fresh, stale = scratch / "new", scratch / "old"
        fresh.mkdir()  # mkdtemp's own directory is closed to other users
        yield fresh
        if out.exists():
            out.rename(stale)
        try:
            fresh.rename(out)
        except OSError:
            if stale.exists():
                stale.rename(out)
            raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _fault_of_disk(error)) is None:
            raise
        raise UserError(f"cannot write {out}: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(scratch)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no JSON, or another value than an object; the message begins with the file's name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object, but {json.dumps(content)[:60]}")
    return content
