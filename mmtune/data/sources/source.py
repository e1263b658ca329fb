"""Rows of every format, by index or as a stream, each with an id that a person can find again.

Which reader serves is decided by the path alone: a file by its ending, a glob or brace list of such files, a folder of them, a
directory that `datasets` saved, or a data set on the hub.
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
from mmtune.data.sources.json_rows import JsonLinesRows, JsonRows, stream_json, stream_json_lines
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
"""The files that can be read."""

_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_BYTE_ORDER_MARKS = {  # that of UTF-32 begins as that of UTF-16 does
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NO_ROWS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; fetch it: git lfs pull",
    b"<!doctype html": "a web page and not a file of rows; download the file itself",
    b"<html": "a web page and not a file of rows; download the file itself",
}
"""How files begin that were not downloaded, in lower case, and what they are."""

_BRACES = re.compile(r"\{([^{}]*)\}")


class FileWatch:
    """Notices that a file is no longer what it was when first looked at: rows would be read from places where others stand."""

    def __init__(self) -> None:
        self._first: dict[Path, tuple[int, int]] = {}

    def check(self, file: Path) -> None:
        """
        Raises:
            UserError: its size or its time of change is another, or it is gone.
        """
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read any more: {error.strerror}") from error
        now = (status.st_size, status.st_mtime_ns)
        if self._first.setdefault(file, now) != now:
            raise UserError(f"{file}: changed since it was opened, and its rows are others; keep it as it is while it is read")


class WatchedRows:
    """The rows of a file, as long as it stays what it was."""

    def __init__(self, file: Path, open_file: Callable[[], Rows]) -> None:
        self._file = file
        self._watch = FileWatch()
        self._watch.check(file)
        self._rows = open_file()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """As the file's reader gives it.

        Raises:
            UserError: the file has changed.
        """
        self._watch.check(self._file)
        return self._rows[index]


def open_rows(path: str | Path, name: str | None = None, rows: str | None = None) -> Rows:
    """The rows of a source, by index.

    Args:
        path: a file; a glob (`*`, `?`, `[...]`, `**`) or brace list (`shard-{000..003}.tar`, `{a,b}.jsonl`) of files, sorted by
            name; a folder of files of one ending; a directory that `datasets` saved; or a hub id, `org/name@config:split`, where
            the configuration may be left out, and so may the split, which then is train.
        name: stands for the file in the rows' ids; None takes the file's own name. Of several files, those that lie in one
            folder with others of the same name elsewhere are told apart by what precedes the pattern in `name`.
        rows: of a `.json` file that holds an object: the key of the list to read, or `"*"` to read every key as a row, with the
            key added as `__key__`.

    Raises:
        UserError: a missing file, an unknown ending, a file that does not parse, or one without rows.
    """
    files = _files_of(str(path), name)
    opened = [_open_file(file, named, rows) for file, named in files] if files else [_open_other(str(path), name, rows)]
    made = opened[0] if len(opened) == 1 else ConcatenatedRows(opened)
    if len(made) == 0:
        raise UserError(f"{path}: holds no rows")
    return made


def stream_rows(
    path: str | Path, name: str | None = None, rows: str | None = None, watch: FileWatch | None = None
) -> Iterator[LazyRow]:
    """The same rows in the same order with the same ids, read as they are asked for and without an index of the whole.

    Args:
        path: as `open_rows`. A hub id is downloaded as it is read.
        name: as `open_rows`.
        rows: as `open_rows`.
        watch: of who reads the same files several times.

    Returns:
        A function for every row, which parses it: what is skipped is never parsed. A RowError comes from calling it.

    Raises:
        UserError: as `open_rows`, at the latest where the fault lies in the file.
    """
    found = False
    for item in _stream(str(path), name, rows, watch or FileWatch()):
        found = True
        yield item
    if not found:
        raise UserError(f"{path}: holds no rows")


def default_media_root(path: str | Path) -> Path:
    """Where the media of a source lie that says nothing of it: beside its file or files, or in its folder."""
    text = str(path)
    if Path(text).is_dir():
        return Path(text)
    if _is_hub(text, None):
        return Path()
    return Path(_before_pattern(text)) if _has_pattern(text) else Path(text).parent


def is_missing_path(path: str) -> bool:
    """Whether a source's path names a local file or folder that is not there."""
    return not Path(path).exists() and not _has_pattern(path) and not _is_hub(path, None)


def data_files(path: str | Path) -> list[Path]:
    """The files that a source's path stands for, a saved data set's too; none for rows on the hub.

    Raises:
        UserError: a pattern without files, or a folder without files of rows.
    """
    if is_saved_dataset(Path(path)):
        return sorted(file for file in Path(path).rglob("*") if file.is_file())
    return [file for file, _ in _files_of(str(path), None)]


class ConcatenatedRows:
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id in its own file, and the row."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part] + len(self._parts[part])]


def _stream(path: str, name: str | None, rows: str | None, watch: FileWatch) -> Iterator[LazyRow]:
    files = _files_of(path, name)
    for file, named in files:
        _check_file(file, rows)
        watch.check(file)
        json = file.suffix.lower() == ".json"
        for item in stream_json(file, named, rows) if json else _STREAM[file.suffix.lower()](file, named):
            watch.check(file)
            yield item
    if not files and _is_hub(path, rows):
        yield from stream_hub(path, name or path)
    elif not files:
        opened = _open_other(path, name, rows)
        yield from (partial(opened.__getitem__, index) for index in range(len(opened)))


def _open_file(file: Path, name: str, rows: str | None) -> Rows:
    _check_file(file, rows)
    if file.suffix.lower() == ".json":
        return WatchedRows(file, partial(JsonRows, file, name, rows))
    return WatchedRows(file, partial(_OPEN[file.suffix.lower()], file, name))


def _check_file(file: Path, rows: str | None) -> None:
    if file.suffix.lower() in _PACKED:
        raise UserError(f"{file}: compressed, so that no row can be read by itself; unpack it")
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"{file}: cannot read '{file.suffix}' files; these can be read: {', '.join(ENDINGS)}")
    if rows is not None and file.suffix.lower() != ".json":
        raise UserError(f"{file}: `rows: {rows}` reads an object in a .json file, and this is none")
    with file.open("rb") as opened:
        head = opened.read(64)
    for start, what in _NO_ROWS.items():
        if head.lower().startswith(start):
            raise UserError(f"{file}: {what}")
    if file.suffix.lower() in _TEXT:
        _check_text(file, head)


def _check_text(file: Path, head: bytes) -> None:
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise UserError(f"{file}: compressed, whatever its name says; unpack it")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head[:4]:
        encoding = "UTF-32" if head[:4].count(0) > 2 else "UTF-16"
    if encoding is not None:
        raise UserError(
            f"{file}: the text is in {encoding}, and rows are read in UTF-8; save it as UTF-8, or convert it: "
            f"iconv -f {encoding} -t UTF-8 '{file}' > '{file.with_stem(f'{file.stem}_utf8')}'"
        )


def _open_other(path: str, name: str | None, rows: str | None) -> Rows:
    """What is no file and no list of files: a saved data set, or one on the hub."""
    if is_saved_dataset(Path(path)):
        if rows is not None:
            raise UserError(f"{path}: `rows: {rows}` reads an object in a .json file, and this is none")
        return open_saved(Path(path), name or Path(path).name)
    if _is_hub(path, rows):
        return open_hub(path, name or path)
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path}: a pipe, a socket or a device; rows are read from files")
    raise UserError(missing_path_message(path, "file or folder"))


def _is_hub(path: str, rows: str | None) -> bool:
    """Whether the rows are on the hub: no local path has this name, and it is not a local path with a wrong spelling."""
    if rows is not None or Path(path).exists() or path.lower().endswith((*ENDINGS, *_PACKED)):
        return False
    repository = hub_repository(path)
    return repository is not None and not is_local_name(repository)


def _files_of(path: str, name: str | None) -> list[tuple[Path, str]]:
    """The files that a path stands for, each with its name in ids; none for what is no file or list of files."""
    check_utf8(path)
    place = Path(path)
    if place.is_file():
        return [(place, name or place.name)]
    if place.is_dir() and not is_saved_dataset(place):
        folder, files = path, _data_files(place)
    elif not place.exists() and _has_pattern(path):
        folder, files = _before_pattern(path), _matches(path)
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
        UserError: a path that is not UTF-8. It cannot be written into reports.
    """
    if not is_utf8(path):
        raise UserError(f"{path.encode('utf-8', 'backslashreplace').decode()}: the name is not valid UTF-8; rename the file")


def _data_files(folder: Path) -> list[str]:
    files = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    endings = sorted({Path(file).suffix.lower() for file in files})
    if not files:
        raise UserError(f"{folder}: no files of rows in this folder; these can be read: {', '.join(ENDINGS)}")
    if len(endings) > 1:
        raise UserError(f"{folder}: holds {' and '.join(endings)} files; say which, such as {folder / '*'}{endings[0]}")
    return files


def _has_pattern(path: str) -> bool:
    return any(character in path for character in "*?[{")


def _before_pattern(path: str) -> str:
    """The folders of a pattern that are plain names, each with its separator behind it."""
    first = min(path.index(character) for character in "*?[{" if character in path)
    return path[: path.rfind("/", 0, first) + 1]


def _matches(pattern: str) -> list[str]:
    found: set[str] = set()
    for plain in _unbraced(pattern):
        matched = [name for name in _globbed(plain) if Path(name).is_file()]
        if not matched:
            raise UserError(missing_path_message(plain, "file") if plain == glob.escape(plain) else f"{plain}: matches no file")
        found.update(matched)
    return sorted(found)


def _globbed(pattern: str) -> list[str]:
    """The paths that a pattern matches. `**` does not go into links to folders, which may lead round in a circle."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)  # noqa: PTH207  (Path.glob takes no absolute pattern)
    folder = _before_pattern(pattern)
    rest = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern[len(folder) :].split("/")]
    found = Path(folder).glob("/".join([*rest, "*"] if rest[-1] == "**" else rest))
    names = [os.path.relpath(path, folder or ".") for path in found]
    shown = any(part.startswith(".") for part in rest)
    return [folder + name for name in names if shown or not any(part.startswith(".") for part in Path(name).parts)]


def _unbraced(pattern: str) -> list[str]:
    """`a-{1,2}` to `a-1` and `a-2`; `{08..10}` to `08`, `09`, `10`."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    inner = braces[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < 1_000_000:
            raise UserError(f"{pattern}: {{{inner}}} is no range; the first number comes first")
        parts = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    elif "," in inner:
        parts = inner.split(",")
    else:
        raise UserError(f"{pattern}: {{{inner}}} is neither a list {{a,b}} nor a range {{000..003}}")
    rest = _unbraced(pattern[braces.end() :])
    return [pattern[: braces.start()] + part + end for part in parts for end in rest]
