"""Files and directories that are written whole or not at all, and where a user's cache is."""

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
    """An existing path whose every part is that of a path which does not exist, or spelt nearly so; None where there is none."""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not (found / part).exists():
            names = _names_in(found)
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
            if not close:
                return None
            part = close[0]
        found /= part
    return found


def not_there(path: Path, only_close: bool = False) -> str:
    """A hint for a path that does not exist: the nearest one that does, or else what its nearest folder holds.

    Args:
        path: as it was given.
        only_close: nothing where no path is spelt nearly so.
    """
    if (close := nearest_path(path)) is not None:
        return f"; did you mean '{close}'?"
    if only_close:
        return ""
    folder = next((each for each in path.parents if each.is_dir()), Path())
    names = _names_in(folder)
    nearest = folder.absolute() if folder == Path() else folder
    if not names:
        return f"; the nearest folder is {nearest}"
    return f"; the nearest folder, {nearest}, holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    except OSError:  # not a folder, or closed to this user
        return []


def user_cache(kind: str) -> Path:
    """Where a user's files of one kind are kept between runs: `~/.cache/mmtune/KIND`.

    Raises:
        UserError: the user has no home directory, as in some containers.
    """
    try:
        return Path.home() / ".cache" / "mmtune" / kind
    except RuntimeError as error:
        raise UserError(f"the cache of {kind}: this user has no home directory; set HOME to a writable folder") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader sees the old text or the new one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """As `replace_text`, for bytes; several threads or processes may write the same file, and the last one stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # tempfile's would be closed to other users
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_as_umask_says(folder: Path) -> None:
    """Give every file of a folder the mode that a new file gets; safetensors writes files that only their owner can read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def linked_directory(out: Path) -> Path:
    """Where a directory goes: the path itself, or what it points to where it is a symbolic link, which then stays.

    Raises:
        UserError: a link into a folder that does not exist, such as on a disk that is not mounted, or to itself.
    """
    if out.name in ("", ".."):  # such as `.`: its name is wanted
        out = Path(os.path.abspath(out))  # noqa: PTH100  (resolve would follow links)
    if not out.is_symlink():
        return out
    try:
        target = out.resolve()
    except RuntimeError as error:  # a loop
        raise UserError(f"{out} is a symbolic link that leads back to itself; remove it") from error
    if target.is_symlink() or not target.parent.is_dir():
        raise UserError(f"{out} is a symbolic link to {target}, and {target.parent} is not there; make it, or remove the link")
    return target


def check_links_stay(folder: Path) -> None:
    """Refuse to copy a folder with links out of it: what they point to would be copied as if it were the folder's.

    Raises:
        UserError: naming the links. Those of the hub's cache, into its own blobs, are no such links.
    """
    homes = [folder.resolve(), folder.resolve().parent.parent / "blobs"]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if foreign := sorted(str(path) for path in links if not any(path.resolve().is_relative_to(home) for home in homes)):
        raise UserError(f"{', '.join(foreign[:5])}: a link out of the folder, which no release copies; put the file there")


def is_mount_point(path: Path) -> bool:
    """Whether a file system or a folder of one is mounted at a path, which then cannot be renamed."""
    mounts = Path("/proc/self/mountinfo")
    here = str(path.resolve()).replace("\\", "\\134").replace(" ", "\\040")
    return os.path.ismount(path) or (mounts.exists() and any(line.split(" ")[4] == here for line in mounts.open()))


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
    out = linked_directory(out)
    if not out.exists():
        return
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out} holds {path}, which is needed; give another path")
    if not overwrite:
        raise UserError(f"{out} exists; give another path, or --overwrite to replace it")
    if not out.is_dir() or (not (out / mark).is_file() and any(out.iterdir())):
        raise UserError(f"{out} is not what would be written there (it has no {mark}), so --overwrite leaves it alone")
    if is_mount_point(out):
        raise UserError(f"{out} is a mount point, which cannot be replaced; give a path inside it")


@contextlib.contextmanager
def replaced_directory(out: Path, overwrite: bool, mark: str, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block ends well, and goes when it does not.

    The arguments are those of `check_replaceable`. What was at `out` stays whole until then, and comes back if the
    renaming fails. Of a symbolic link the target is replaced. Files get the modes that the umask says. One process at a time
    may write `out`; what a killed one left beside it is removed first.

    Raises:
        UserError: as `check_replaceable`; another process writes `out`; or the directory beside `out` cannot be made.
    """
    out = linked_directory(out)
    with locked(out) as is_locked:
        if is_locked:
            _remove_leftovers(out)
        check_replaceable(out, overwrite, mark, keep)
        with _replaced(out) as fresh:
            yield fresh


def _remove_leftovers(out: Path) -> None:
    """Remove the temporary directories of processes that were killed; `out` is locked, so that no live one has any."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]+\.partial")
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if (path / "old").exists() and not out.exists():  # killed between the two renamings
                (path / "old").rename(out)
            try:
                shutil.rmtree(path)
            except OSError as error:  # another user's
                print(f"left alone: {path}: {error.strerror}")


@contextlib.contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        fresh, stale = scratch / "new", scratch / "old"
        fresh.mkdir()  # mkdtemp's own directory is closed to other users
        yield fresh
        open_as_umask_says(fresh)
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


def read_record(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """As `read_json_object`, of a file that mmtune or a library has written and somebody may have changed.

    Args:
        kinds: the keys that are needed, and the types of their values.

    Raises:
        UserError: also when a key is missing or its value is of another type; the message begins with the file's path.
        OSError: the file cannot be read.
    """
    try:
        content = read_json_object(path)
    except UserError as error:
        raise UserError(f"{path}: not as it was written: {error}") from error
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: not as it was written: {key} is {str(content.get(key))[:40]!r}")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no JSON, or another value than an object; the message begins with the file's name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object, but {json.dumps(content)[:60]}")
    return content
