"""Rows of JSON and JSON Lines files. Byte offsets are kept in memory, and a row is parsed when asked for."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mmtune.data.message import RowError
from mmtune.data.sources.rows import MAX_ROW_BYTES, LazyRow, Row, expect_object, parse_json, text_lines
from mmtune.utils.errors import UserError, nearest

BOM = b"\xef\xbb\xbf"
CHUNK = 2**20
EVERY_KEY = "*"
"""As `rows`: the file is an object, and each of its keys names a row."""

_QUOTE, _COMMA, _BACKSLASH = b'",\\'
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_MARKS = bytes(byte in b'",[]{}' for byte in range(256))
_KEY = re.compile(rb'\s*+("(?:[^"\\]++|\\.)*+")\s*+:\s*+', re.DOTALL)
_SCALAR = re.compile(rb'"|-?\d|(true|false|null)\b')
_KEY_BYTES = 2**16  # more of a key than this is not looked at


class JsonRows:
    """The rows of a `.json` file: of its list, of a list under one of its keys, or of an object keyed by row."""

    def __init__(self, path: Path, name: str, rows: str | None) -> None:
        self._path = path
        self._name = name
        self._rows = rows
        with path.open("rb") as file:
            cuts = list(_cuts(file, path, rows))
        self._cuts = np.concatenate(cuts)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id, `FILE[INDEX]`, `FILE:KEY[INDEX]` or `FILE:KEY`, and the row."""
        index = range(len(self))[index]
        start, end = int(self._cuts[index]) + 1, int(self._cuts[index + 1])
        with self._path.open("rb") as file:
            return _element(self._name, self._rows, index, _between(file, self._path, start, end))


def stream_json(path: Path, name: str, rows: str | None) -> Iterator[LazyRow]:
    """The same rows in order, read as they are asked for."""
    index, start = 0, None
    with path.open("rb") as scanned, path.open("rb") as file:
        for cuts in _cuts(scanned, path, rows):
            for cut in cuts.tolist():
                if start is not None:
                    yield partial(_element, name, rows, index, _between(file, path, start, cut))
                    index += 1
                start = cut + 1


def _between(file: BinaryIO, path: Path, start: int, end: int) -> bytes:
    if end - start > MAX_ROW_BYTES:
        raise UserError(f"{path}: the row at byte {start} has more than {MAX_ROW_BYTES // 2**20} MiB, the most that is read")
    file.seek(start)
    return file.read(end - start)


def _element(name: str, rows: str | None, index: int, text: bytes) -> tuple[str, Row]:
    if rows != EVERY_KEY:
        row_id = f"{name}[{index}]" if rows is None else f"{name}:{rows}[{index}]"
        return row_id, expect_object(row_id, parse_json(row_id, "row", text))
    row_id = f"{name}:{key}" if (key := _key(text)) is not None else f"{name}[{index}]"
    [(key, row)] = expect_object(row_id, parse_json(row_id, "row", b"{" + text + b"}")).items() or [(None, None)]
    if key is None:
        raise RowError(row_id, "row", "not valid JSON: a comma with nothing behind it", "row_not_json")
    return row_id, {**expect_object(row_id, row), "__key__": key}


def _key(member: bytes) -> str | None:
    """The key of `"key": value`."""
    found = _KEY.match(member)
    try:
        return str(parse_json("", "", found[1])) if found else None
    except RowError:
        return None


def _cuts(file: BinaryIO, path: Path, rows: str | None) -> Iterator[npt.NDArray[np.int64]]:
    """Where the rows lie: the bytes between one position and the next, exclusive, are a row.

    Raises:
        UserError: a file that does not hold rows where `rows` says, or is cut short.
    """
    start = _skip_space(file, len(BOM) if file.read(len(BOM)) == BOM else 0)
    opening = _byte(file, start)
    if (opening == b"[" and rows is None) or (opening == b"{" and rows == EVERY_KEY):
        yield from _whole_value(file, path, start)
    elif opening == b"{" and rows is not None:
        yield from _parted(file, path, _member_list(file, path, start, rows))
    elif opening == b"{":
        keys = [f"{key} ({_kind(file, at)})" for key, at in _members(file, path, start, 8)]
        raise UserError(
            f"{path}: expected a list of rows, found an object with {', '.join(keys) or 'nothing'}; `rows: KEY` reads the list "
            "under one of its keys, and `rows: '*'` reads every key as a row of its own"
        )
    elif opening == b"[":
        raise UserError(f"{path}: `rows: {rows}` reads an object, and the file holds a list; leave it out")
    elif opening == b"":
        raise UserError(f"{path}: not valid JSON: the file is empty")
    elif _SCALAR.match(head := _head(file, start)):
        raise UserError(f"{path}: expected a list of rows, found {_kind(file, start)}")
    else:
        file.seek(0)
        line = 1 + file.read(start).count(b"\n")
        shown = head.decode("utf-8", "replace").split("\n")[0]
        raise UserError(f"{path}:{line}: not JSON: the text begins {shown!r}; expected a list of objects, [{{...}}, ...]")


def _whole_value(file: BinaryIO, path: Path, start: int) -> Iterator[npt.NDArray[np.int64]]:
    end = start
    for cuts in _parted(file, path, start):
        end = int(cuts[-1])
        yield cuts
    behind = _skip_space(file, end + 1)
    if found := _byte(file, behind):
        hint = "; one value a line is JSON Lines, and such a file's name ends in .jsonl" if found in (b"{", b"[") else ""
        raise UserError(f"{path}: not valid JSON: more after the end of the first value, at byte {behind}{hint}")


def _parted(file: BinaryIO, path: Path, start: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of the opening bracket at `start`, of the commas between its elements, and of the closing one.

    Nothing, where it holds no elements. What lies between them is not looked at: it is parsed when a row is asked for.
    """
    opening = _byte(file, start)
    first = _skip_space(file, start + 1)
    if _byte(file, first) == (closing := {b"[": b"]", b"{": b"}"}[opening]):
        yield np.array([first], dtype=np.int64)
        return
    file.seek(start)
    depth, in_string, position, held = 0, False, start, b""
    while chunk := file.read(CHUNK):
        chunk = held + chunk
        whole = len(chunk.rstrip(b"\\"))  # what a run of backslashes escapes is decided in one piece
        chunk, held = chunk[:whole], chunk[whole:]
        data = np.frombuffer(chunk, dtype=np.uint8)
        marks = np.flatnonzero(np.frombuffer(chunk.translate(_MARKS), dtype=np.bool_))
        if b"\\" in chunk:
            marks = marks[~_escaped(data)[marks]]
        quotes = data[marks] == _QUOTE
        inside = np.bitwise_xor.accumulate(quotes) ^ in_string
        in_string = bool(inside[-1]) if len(inside) else in_string
        marks = marks[~quotes & ~inside]
        steps = _STEP[data[marks]]
        depths = depth + np.cumsum(steps, dtype=np.int64)
        depth = int(depths[-1]) if len(depths) else depth
        cuts = marks[((depths == 1) & ((data[marks] == _COMMA) | (marks + position == start))) | (depths == 0)]
        ended = np.flatnonzero(depths == 0)
        if len(ended):
            end = int(marks[ended[0]])
            if chunk[end : end + 1] != closing:
                raise UserError(
                    f"{path}: not valid JSON: the wrong bracket at byte {position + end} closes the one at byte {start}"
                )
            yield cuts[cuts <= end] + position
            return
        if len(cuts):
            yield cuts + position
        position += whole
    raise UserError(f"{path}: not valid JSON: the file ends before the bracket at byte {start} is closed; it was cut short")


def _escaped(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which bytes stand behind an odd number of backslashes."""
    slashes = np.flatnonzero(data == _BACKSLASH)
    apart = np.diff(slashes) != 1
    starts = slashes[np.concatenate([[True], apart])]
    ends = slashes[np.concatenate([apart, [True]])]
    escaped = np.zeros(len(data) + 1, dtype=np.bool_)
    escaped[ends[(ends - starts) % 2 == 0] + 1] = True
    return escaped[:-1]


def _members(file: BinaryIO, path: Path, start: int, most: int | None = None) -> Iterator[tuple[str, int]]:
    """The keys of the object at `start`, each with the position of its value."""
    count, previous = 0, None
    for cuts in _whole_value(file, path, start):
        for cut in cuts.tolist():
            if previous is not None and (most is None or count < most):
                place = file.tell()
                file.seek(previous + 1)
                head = file.read(min(_KEY_BYTES, cut - previous - 1))
                file.seek(place)
                found, key = _KEY.match(head), _key(head)
                if found is None or key is None:
                    raise UserError(f"{path}: not valid JSON: expected a key and a value at byte {previous + 1}")
                yield key, previous + 1 + found.end()
                count += 1
            previous = cut
        if count == most:
            return


def _member_list(file: BinaryIO, path: Path, start: int, rows: str) -> int:
    """The position of the one list under the key `rows`."""
    members = list(_members(file, path, start))
    positions = [at for key, at in members if key == rows]
    if not positions:
        raise UserError(f"{path}: no key '{rows}'{nearest(rows, {key for key, _ in members})}")
    if len(positions) > 1:
        raise UserError(f"{path}: the key '{rows}' comes {len(positions)} times")
    if _byte(file, positions[0]) != b"[":
        raise UserError(f"{path}: '{rows}' holds {_kind(file, positions[0])}, not a list of rows")
    return positions[0]


def _byte(file: BinaryIO, position: int) -> bytes:
    file.seek(position)
    return file.read(1)


def _head(file: BinaryIO, position: int) -> bytes:
    file.seek(position)
    return file.read(60)


def _skip_space(file: BinaryIO, position: int) -> int:
    file.seek(position)
    while chunk := file.read(CHUNK):
        if rest := chunk.lstrip(b" \t\r\n"):
            return position + len(chunk) - len(rest)
        position += len(chunk)
    return position


def _kind(file: BinaryIO, position: int) -> str:
    place = file.tell()
    first = _byte(file, position)
    file.seek(place)
    return {b"[": "a list", b"{": "an object", b'"': "text"}.get(first, "a number, true, false or null" if first else "nothing")


class JsonLinesRows:
    """The rows of a `.jsonl` file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._offsets = array("q")
        self._lines = array("q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(text_lines(file, path), start=1):
                if _has_row(number, line):
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `FILE:LINE` and the row."""
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return _line(self._name, self._lines[index], file.readline())


def stream_json_lines(path: Path, name: str) -> Iterator[LazyRow]:
    """The same rows in order, read as they are asked for."""
    with path.open("rb") as file:
        for number, line in enumerate(text_lines(file, path), start=1):
            if _has_row(number, line):
                yield partial(_line, name, number, line)


def _has_row(number: int, line: bytes) -> bool:
    return not (line.isspace() or (number == 1 and not line.removeprefix(BOM).strip()))


def _line(name: str, number: int, line: bytes) -> tuple[str, Row]:
    row_id = f"{name}:{number}"
    text = line.removeprefix(BOM) if number == 1 else line
    try:
        return row_id, expect_object(row_id, parse_json(row_id, "row", text))
    except RowError as error:
        if text.lstrip().startswith(b"["):
            detail = f"{error.detail}; each line is a row here: a file that holds one list is named .json"
            raise RowError(row_id, error.field, detail, error.issue) from error
        raise
