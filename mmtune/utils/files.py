"""Files and directories: atomic writes, checks of destinations, hints for missing paths, the user's cache."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmtune.utils.errors import UserError
from mmtune.utils.locks import locked

USER_CACHE = Path("~/.cache/mmtune")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def report_disk_errors(path: Path) -> Iterator[None]:
    """Raise a UserError if writing `path` in the block fails because of the disk.

    Raises:
        UserError: the disk is full, failing or read-only, or a quota or limit is reached.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


def _disk_error(error: Exception) -> str | None:
    """The reason of an error that the disk caused; None for other errors. safetensors quotes the system, torch does not."""
    text = str(error)
    if isinstance(error, RuntimeError) and "inline_container.cc" in text:
        return "the file could not be written completely; is the disk full?"
    return text if any(os.strerror(number) in text for number in DISK_ERRORS) else None


def fsync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk, so that it survives a crash of the machine."""
    for path in (folder, *folder.rglob("*")):
        fsync(path)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, prefix: str = "") -> None:
    """Check that a file can be created in a folder, or in its nearest existing parent.

    Args:
        folder: where something will be written later.
        prefix: begins the message.

    Raises:
        UserError: no file can be created there.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{prefix}cannot write in {existing}: {error.strerror}") from error


def nearest_path(path: Path) -> Path | None:
    """The existing path that is spelt most like a missing one, part by part; None if there is none."""
    nearest = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not (nearest / part).exists():
            close = difflib.get_close_matches(part, _names_in(nearest), n=1, cutoff=0.6)
            if not close:
                return None
            part = close[0]
        nearest /= part
    return nearest


def path_hint(path: Path, only_close: bool = False) -> str:
    """A hint for a missing path: the existing path spelt most like it, or else the content of its nearest existing folder.

    Args:
        path: the missing path.
        only_close: return an empty text if no path is spelt like it.
    """
    if (close := nearest_path(path)) is not None:
        return f"; did you mean '{close}'?"
    if only_close:
        return ""
    folder = next((each for each in path.parents if each.is_dir()), Path())
    names = _names_in(folder)
    nearest = folder.absolute() if folder == Path() else folder
    if not names:
        return f"; the nearest existing folder is {nearest}"
    return f"; the nearest existing folder, {nearest}, contains {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    except OSError:  # not a folder, or no permission
        return []


def user_cache(kind: str) -> Path:
    """The user's cache directory for one kind of files: `~/.cache/mmtune/KIND`.

    Raises:
        UserError: the user has no home directory, as in some containers.
    """
    try:
        return USER_CACHE.expanduser() / kind
    except RuntimeError as error:
        raise UserError(f"the cache of {kind}: this user has no home directory; set HOME to a writable folder") from error


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: write a temporary file, then rename it."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """As `replace_text`, for bytes. Several threads or processes may write the same file; the last one wins."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not tempfile, whose files other users cannot read
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_file(path: Path, data: bytes) -> None:
    """Write a new file, which is removed again if writing fails.

    Raises:
        OSError: it exists (FileExistsError), or cannot be written.
    """
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
        except BaseException:
            path.unlink()
            raise


def apply_umask(folder: Path) -> None:
    """Set the mode of every file in a folder to that of a new file. safetensors writes files that only the owner can read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def resolve_link(out: Path) -> Path:
    """The directory to write: the path itself, or the target of a symbolic link.

    Raises:
        UserError: a link to itself, or into a folder that does not exist, such as on a disk that is not mounted.
    """
    if out.name in ("", ".."):  # such as `.`
        out = Path(os.path.abspath(out))  # noqa: PTH100  (resolve would follow links)
    if not out.is_symlink():
        return out
    try:
        target = out.resolve()
    except RuntimeError as error:  # a loop
        raise UserError(f"{out} is a symbolic link to itself; remove it") from error
    if target.is_symlink() or not target.parent.is_dir():
        raise UserError(
            f"{out} is a symbolic link to {target}, and {target.parent} does not exist; create it, or remove the link"
        )
    return target


def check_links(folder: Path) -> None:
    """Reject symbolic links to files outside a folder that will be copied.

    Raises:
        UserError: with the links. Links of the hub's cache to its blobs are allowed.
    """
    allowed = [folder.resolve(), folder.resolve().parent.parent / "blobs"]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if outside := sorted(str(path) for path in links if not any(path.resolve().is_relative_to(root) for root in allowed)):
        raise UserError(f"{', '.join(outside[:5])}: a link to a file outside the folder; replace it by the file")


def is_mount_point(path: Path) -> bool:
    """Whether a path is a mount point, also of a bind mount, and so cannot be renamed."""
    mounts = Path("/proc/self/mountinfo")
    here = str(path.resolve()).replace("\\", "\\134").replace(" ", "\\040")
    return os.path.ismount(path) or (mounts.exists() and any(line.split(" ")[4] == here for line in mounts.open()))


def expand_user(path: str) -> str:
    """Replace a leading `~` by the home directory, like a shell. Other text is returned unchanged."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user: the path is then reported as missing
        return path


def check_replaceable(out: Path, overwrite: bool, mark: str, keep: Sequence[Path] = ()) -> None:
    """Check that a directory may be written at `out`.

    Args:
        out: the path of the directory.
        overwrite: whether an earlier one may be replaced.
        mark: a file that every earlier one contains. Other directories are not replaced unless they are empty.
        keep: paths that are still needed and must not be inside `out`.

    Raises:
        UserError: `out` must not be written; with the reason.
    """
    out = resolve_link(out)
    if not out.exists():
        return
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out} contains {path}, which is still needed; give another path")
    if not overwrite:
        raise UserError(f"{out} exists; give another path, or --overwrite to replace it")
    if not out.is_dir() or (not (out / mark).is_file() and any(out.iterdir())):
        raise UserError(
            f"{out}: expected an earlier output with {mark}, got another file or directory, which --overwrite does not replace"
        )
    if is_mount_point(out):
        raise UserError(f"{out} is a mount point, which cannot be replaced; give a path inside it")


@contextlib.contextmanager
def replaced_directory(out: Path, overwrite: bool, mark: str, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """Replace a directory atomically: yield a temporary directory that is renamed to `out` when the block succeeds.

    The arguments are those of `check_replaceable`. The earlier directory stays until then, and is restored if renaming fails. A
    symbolic link keeps pointing to the new directory. Files get the modes of the umask. `out` is locked against other
    processes, and leftovers of killed processes are removed first.

    Raises:
        UserError: as `check_replaceable`; another process writes `out`; or the temporary directory cannot be created.
    """
    out = resolve_link(out)
    with locked(out) as is_locked:
        if is_locked:
            _remove_leftovers(out)
        check_replaceable(out, overwrite, mark, keep)
        with _replaced(out) as fresh:
            yield fresh


def _remove_leftovers(out: Path) -> None:
    """Remove the temporary directories of killed processes. The caller holds the lock of `out`, so none is in use."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]+\.partial")
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if (path / "old").exists() and not out.exists():  # killed between the two renames
                (path / "old").rename(out)
            try:
                shutil.rmtree(path)
            except OSError as error:  # another user's
                print(f"not removed: {path}: {error.strerror}")


@contextlib.contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        fresh, stale = scratch / "new", scratch / "old"
        fresh.mkdir()  # other users cannot read the directory of mkdtemp
        yield fresh
        apply_umask(fresh)
        if out.exists():
            out.rename(stale)
        try:
            fresh.rename(out)
        except OSError:
            if stale.exists():
                stale.rename(out)
            raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _disk_error(error)) is None:
            raise
        raise UserError(f"cannot write {out}: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(scratch)


def read_record(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """As `read_json_object`, with a check of keys: for a file that was written by a program and may have been edited.

    Args:
        kinds: required keys and the types of their values.

    Raises:
        UserError: no JSON object, or a key is missing or has another type; the message begins with the file's path.
        OSError: the file cannot be read.
    """
    try:
        content = read_json_object(path)
    except UserError as error:
        raise UserError(f"{path}: damaged or edited: {error}") from error
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: damaged or edited: the value of {key} is {str(content.get(key))[:40]!r}")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: not a JSON object; the message begins with the file's name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: expected a JSON object, got {json.dumps(content)[:60]}")
    return content
