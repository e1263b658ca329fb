"""Row sources: opening files and data sets of every format, by index or as a stream.

The path alone decides which reader is used: a file (by its extension), a glob or brace list of files, a folder of files, a
directory saved by `datasets`, or a data set on the hub. Every row has an id that names its file and position.
"""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

from mmtune.data.media.media_names import is_utf8
from mmtune.data.sources.arrow_rows import open_arrow, open_parquet, stream_arrow, stream_parquet
from mmtune.data.sources.csv_rows import CsvRows, stream_csv
from mmtune.data.sources.hub_rows import hub_repository, is_saved_dataset, open_hub, open_saved, stream_hub
from mmtune.data.sources.json_rows import JsonLinesRows, JsonRows, is_json_lines, stream_json, stream_json_lines
from mmtune.data.sources.rows import LazyRow, Row, Rows
from mmtune.data.sources.webdataset_rows import TarRows, stream_tar
from mmtune.utils.errors import UserError
from mmtune.utils.hub import is_local_name, missing_path_message

__all__ = ["ENDINGS", "LazyRow", "Row", "Rows", "default_media_root", "open_rows", "stream_rows"]

_OPEN: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": JsonLinesRows,
    ".ndjson": JsonLinesRows,
    ".csv": CsvRows,
    ".tsv": CsvRows,
    ".parquet": open_parquet,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".tar": TarRows,
}
_STREAM: dict[str, Callable[[Path, str], Iterator[LazyRow]]] = {
    ".jsonl": stream_json_lines,
    ".ndjson": stream_json_lines,
    ".csv": stream_csv,
    ".tsv": stream_csv,
    ".parquet": stream_parquet,
    ".arrow": stream_arrow,
    ".feather": stream_arrow,
    ".tar": stream_tar,
}
ENDINGS = (".json", *_OPEN)
"""File extensions that can be read."""

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with the mark of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NOT_DOWNLOADED = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it: git lfs pull",
    b"<!doctype html": "a web page, not a file of rows; download the file itself",
    b"<html": "a web page, not a file of rows; download the file itself",
}
"""First bytes (lower case) of files that were not really downloaded, and what such a file is."""

_BRACES = re.compile(r"\{([^{}]*)\}")


class FileWatch:
    """Detects that a file changed after it was first read: its row offsets would then point at other rows."""

    def __init__(self) -> None:
        self._first: dict[Path, tuple[int, int]] = {}

    def check(self, file: Path) -> None:
        """
        Raises:
            UserError: the size or the modification time changed, or the file was removed.
        """
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"{file}: can no longer be read: {error.strerror}") from error
        now = (status.st_size, status.st_mtime_ns)
        if self._first.setdefault(file, now) != now:
            raise UserError(f"{file}: changed since it was opened; do not modify the file while a run reads it")


class WatchedRows:
    """The rows of a file that must not change while it is read."""

    def __init__(self, file: Path, open_file: Callable[[], Rows]) -> None:
        self._file = file
        self._watch = FileWatch()
        self._watch.check(file)
        self._rows = open_file()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id and the row, from the file's reader.

        Raises:
            UserError: the file changed.
        """
        self._watch.check(self._file)
        return self._rows[index]


def open_rows(path: str | Path, name: str | None = None, rows: str | None = None) -> Rows:
    """Open the rows of a source for access by index.

    Args:
        path: a file; a glob (`*`, `?`, `[...]`, `**`) or brace list (`shard-{000..003}.tar`, `{a,b}.jsonl`) of files, sorted by
            name; a folder of files with the same extension; a directory saved by `datasets`; or a hub id,
            `org/name@config:split`. The configuration and the split are optional; the default split is train.
        name: the file name to use in row ids; None uses the file's own name. For several files, the folders before the pattern
            in `name` come first in the ids, so that files with the same name in different folders have different ids.
        rows: for a `.json` file with an object: the key of the list to read, or `"*"` to read the value of every key as a row,
            with the key added as `__key__`.

    Raises:
        UserError: a missing file, an unknown file extension, a file that cannot be parsed, or a file without rows.
    """
    files = _resolve_files(str(path), name)
    if files:
        parts = [_open_file(file, file_name, rows) for file, file_name in files]
    else:
        parts = [_open_dataset(str(path), name, rows)]
    opened = parts[0] if len(parts) == 1 else ConcatenatedRows(parts)
    if len(opened) == 0:
        raise UserError(f"{path}: has no rows")
    return opened


def stream_rows(
    path: str | Path, name: str | None = None, rows: str | None = None, watch: FileWatch | None = None
) -> Iterator[LazyRow]:
    """Stream the rows of a source: the same rows, order and ids as `open_rows`, read on demand and without an index.

    Args:
        path: as in `open_rows`. A hub data set is downloaded while it is read.
        name: as in `open_rows`.
        rows: as in `open_rows`.
        watch: shared by several passes over the same files, to detect changes between them.

    Yields:
        For every row a function that parses it, so that skipped rows are never parsed. The function can raise a RowError.

    Raises:
        UserError: as in `open_rows`; for an error inside a file, when the stream reaches it.
    """
    is_empty = True
    for lazy_row in _stream(str(path), name, rows, watch or FileWatch()):
        is_empty = False
        yield lazy_row
    if is_empty:
        raise UserError(f"{path}: has no rows")


def default_media_root(path: str | Path) -> Path:
    """The media root of a source that does not set `media_root`: the folder of its files."""
    text = str(path)
    if Path(text).is_dir():
        return Path(text)
    if _is_hub(text, None):
        return Path()
    return Path(_before_pattern(text)) if _has_pattern(text) else Path(text).parent


def is_missing_path(path: str) -> bool:
    """Whether a source's path is a local file or folder that does not exist."""
    return not Path(path).exists() and not _has_pattern(path) and not _is_hub(path, None)


def data_files(path: str | Path) -> list[Path]:
    """All local files of a source, including those of a saved data set; empty for a data set on the hub.

    Raises:
        UserError: a pattern that matches no file, or a folder without data files.
    """
    if is_saved_dataset(Path(path)):
        return sorted(file for file in Path(path).rglob("*") if file.is_file())
    return [file for file, _ in _resolve_files(str(path), None)]


class ConcatenatedRows:
    """The rows of several files, concatenated in order."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The row and its id, which names the file it comes from."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part] + len(self._parts[part])]


def _stream(path: str, name: str | None, rows: str | None, watch: FileWatch) -> Iterator[LazyRow]:
    files = _resolve_files(path, name)
    for file, file_name in files:
        _check_file(file, rows)
        watch.check(file)
        suffix = _format(file, rows)
        file_rows = stream_json(file, file_name, rows) if suffix == ".json" else _STREAM[suffix](file, file_name)
        for lazy_row in file_rows:
            watch.check(file)
            yield lazy_row
    if not files and _is_hub(path, rows):
        yield from stream_hub(path, name or path)
    elif not files:
        opened = _open_dataset(path, name, rows)
        yield from (partial(opened.__getitem__, index) for index in range(len(opened)))


def _open_file(file: Path, name: str, rows: str | None) -> Rows:
    _check_file(file, rows)
    suffix = _format(file, rows)
    if suffix == ".json":
        return WatchedRows(file, partial(JsonRows, file, name, rows))
    return WatchedRows(file, partial(_OPEN[suffix], file, name))


def _format(file: Path, rows: str | None) -> str:
    """The file extension of a file's format: `.jsonl` also for a `.json` file with one object per line."""
    suffix = file.suffix.lower()
    return ".jsonl" if suffix == ".json" and rows is None and is_json_lines(file) else suffix


def _check_file(file: Path, rows: str | None) -> None:
    if file.suffix.lower() in _COMPRESSED:
        raise UserError(f"{file}: a compressed file, whose rows cannot be read by index; decompress it")
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"{file}: unknown file extension; expected one of {', '.join(ENDINGS)}, got '{file.suffix}'")
    if rows is not None and file.suffix.lower() != ".json":
        raise UserError(f"{file}: `rows: {rows}` applies to a .json file with an object; this is a {file.suffix} file")
    with file.open("rb") as opened:
        head = opened.read(64)
    for start, description in _NOT_DOWNLOADED.items():
        if head.lower().startswith(start):
            raise UserError(f"{file}: {description}")
    if file.suffix.lower() in _TEXT:
        _check_text(file, head)


def _check_text(file: Path, head: bytes) -> None:
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise UserError(f"{file}: a compressed file, in spite of its extension; decompress it")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head[:4]:
        encoding = "UTF-32" if head[:4].count(0) > 2 else "UTF-16"
    if encoding is not None:
        raise UserError(
            f"{file}: expected UTF-8 text, got {encoding}; save it as UTF-8, or convert it: "
            f"iconv -f {encoding} -t UTF-8 '{file}' > '{file.with_stem(f'{file.stem}_utf8')}'"
        )


def _open_dataset(path: str, name: str | None, rows: str | None) -> Rows:
    """Open a path that is neither a file nor a list of files: a saved data set, or one on the hub."""
    if is_saved_dataset(Path(path)):
        if rows is not None:
            raise UserError(
                f"{path}: `rows: {rows}` applies to a .json file with an object; this is a data set saved by `datasets`"
            )
        return open_saved(Path(path), name or Path(path).name)
    if _is_hub(path, rows):
        return open_hub(path, name or path)
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path}: expected a regular file, got a pipe, a socket or a device")
    raise UserError(missing_path_message(path, "file or folder"))


def _is_hub(path: str, rows: str | None) -> bool:
    """Whether a path is a hub id: no local path has this name, and it does not look like a mistyped local path."""
    if rows is not None or Path(path).exists() or path.lower().endswith((*ENDINGS, *_COMPRESSED)):
        return False
    repository = hub_repository(path)
    return repository is not None and not is_local_name(repository)


def _resolve_files(path: str, name: str | None) -> list[tuple[Path, str]]:
    """The files that a path refers to, each with its name in row ids; empty if the path is not a file or a list of files."""
    check_utf8(path)
    local = Path(path)
    if local.is_file():
        return [(local, name or local.name)]
    if local.is_dir() and not is_saved_dataset(local):
        folder, files = path, _files_in_folder(local)
    elif not local.exists() and _has_pattern(path):
        folder, files = _before_pattern(path), _matching_files(path)
    else:
        return []
    if name is None:
        before = ""
    else:
        before = _before_pattern(name) if _has_pattern(name) else name
    for file in files:
        check_utf8(file)
    return [(Path(file), str(Path(before) / os.path.relpath(file, folder or "."))) for file in files]


def check_utf8(path: str) -> None:
    """
    Raises:
        UserError: the path is not valid UTF-8, so it could not be written into reports.
    """
    if not is_utf8(path):
        raise UserError(f"{path.encode('utf-8', 'backslashreplace').decode()}: the file name is not valid UTF-8; rename the file")


def _files_in_folder(folder: Path) -> list[str]:
    files = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    if not files:
        raise UserError(f"{folder}: no data files in this folder; expected files with one of the extensions {', '.join(ENDINGS)}")
    if len(suffixes) > 1:
        raise UserError(
            f"{folder}: expected files of one format, got {' and '.join(suffixes)} files; choose one of them, such as "
            f"{folder / '*'}{suffixes[0]}"
        )
    return files


def _has_pattern(path: str) -> bool:
    return any(character in path for character in "*?[{")


def _before_pattern(path: str) -> str:
    """The leading folders of a path that have no pattern characters, with the last separator."""
    first = min(path.index(character) for character in "*?[{" if character in path)
    return path[: path.rfind("/", 0, first) + 1]


def _matching_files(pattern: str) -> list[str]:
    paths: set[str] = set()
    for plain in _expand_braces(pattern):
        matches = [name for name in _expand_glob(plain) if Path(name).is_file()]
        if not matches:
            raise UserError(
                missing_path_message(plain, "file") if plain == glob.escape(plain) else f"{plain}: the pattern matches no file"
            )
        paths.update(matches)
    return sorted(paths)


def _expand_glob(pattern: str) -> list[str]:
    """The paths that a pattern matches. `**` does not follow links to folders, because they can form a cycle."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)  # noqa: PTH207  (Path.glob does not accept an absolute pattern)
    folder = _before_pattern(pattern)
    rest = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern[len(folder) :].split("/")]
    paths = Path(folder).glob("/".join([*rest, "*"] if rest[-1] == "**" else rest))
    names = [os.path.relpath(path, folder or ".") for path in paths]
    if not any(part.startswith(".") for part in rest):
        names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
    return [folder + name for name in names]


def _expand_braces(pattern: str) -> list[str]:
    """Expand `a-{1,2}` to `a-1` and `a-2`, and `{08..10}` to `08`, `09` and `10`."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    inner = braces[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < 1_000_000:
            raise UserError(
                f"{pattern}: {{{inner}}} is not a valid range; expected the smaller number first and at most 1,000,000 numbers"
            )
        parts = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    elif "," in inner:
        parts = inner.split(",")
    else:
        raise UserError(f"{pattern}: expected a list {{a,b}} or a range {{000..003}}, got {{{inner}}}")
    rest = _expand_braces(pattern[braces.end() :])
    return [pattern[: braces.start()] + part + end for part in parts for end in rest]
