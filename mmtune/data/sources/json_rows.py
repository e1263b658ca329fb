"""Rows of JSON and JSON Lines files. Only byte offsets are kept in memory; a row is parsed when it is read."""

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
"""Value of `rows`: the file is an object, and the value of each key is a row."""

_QUOTE, _COMMA, _BACKSLASH = b'",\\'
_DEPTH_CHANGE = np.zeros(256, dtype=np.int8)
_DEPTH_CHANGE[list(b"[{")], _DEPTH_CHANGE[list(b"]}")] = 1, -1
_STRUCTURAL = bytes(byte in b'",[]{}' for byte in range(256))
_KEY = re.compile(rb'\s*+("(?:[^"\\]++|\\.)*+")\s*+:\s*+', re.DOTALL)
_SCALAR = re.compile(rb'"|-?\d|(true|false|null)\b')
_KEY_BYTES = 2**16  # at most this many bytes of a key are parsed


class JsonRows:
    """The rows of a `.json` file: its list, a list under one of its keys, or the values of its keys."""

    def __init__(self, path: Path, name: str, rows: str | None) -> None:
        self._path = path
        self._name = name
        self._rows = rows
        with path.open("rb") as file:
            boundaries = list(_row_boundaries(file, path, rows))
        self._boundaries = np.concatenate(boundaries)

    def __len__(self) -> int:
        return len(self._boundaries) - 1

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id, `FILE[INDEX]`, `FILE:KEY[INDEX]` or `FILE:KEY`, and the row."""
        index = range(len(self))[index]
        start, end = int(self._boundaries[index]) + 1, int(self._boundaries[index + 1])
        with self._path.open("rb") as file:
            return _parse_element(self._name, self._rows, index, _read_range(file, self._path, start, end))


def stream_json(path: Path, name: str, rows: str | None) -> Iterator[LazyRow]:
    """Stream the same rows in order, read on demand."""
    index, start = 0, None
    with path.open("rb") as scanned, path.open("rb") as file:
        for boundaries in _row_boundaries(scanned, path, rows):
            for boundary in boundaries.tolist():
                if start is not None:
                    yield partial(_parse_element, name, rows, index, _read_range(file, path, start, boundary))
                    index += 1
                start = boundary + 1


def _read_range(file: BinaryIO, path: Path, start: int, end: int) -> bytes:
    if end - start > MAX_ROW_BYTES:
        raise UserError(f"{path}: expected a row of at most {MAX_ROW_BYTES // 2**20} MiB, got a longer one at byte {start}")
    file.seek(start)
    return file.read(end - start)


def _parse_element(name: str, rows: str | None, index: int, text: bytes) -> tuple[str, Row]:
    if rows != EVERY_KEY:
        row_id = f"{name}[{index}]" if rows is None else f"{name}:{rows}[{index}]"
        return row_id, expect_object(row_id, parse_json(row_id, "row", text))
    row_id = f"{name}:{key}" if (key := _key(text)) is not None else f"{name}[{index}]"
    [(key, row)] = expect_object(row_id, parse_json(row_id, "row", b"{" + text + b"}")).items() or [(None, None)]
    if key is None:
        raise RowError(row_id, "row", "not valid JSON: nothing after a comma", "row_not_json")
    return row_id, {**expect_object(row_id, row), "__key__": key}


def _key(member: bytes) -> str | None:
    """The key of `"key": value`."""
    match = _KEY.match(member)
    try:
        return str(parse_json("", "", match[1])) if match else None
    except RowError:
        return None


def _row_boundaries(file: BinaryIO, path: Path, rows: str | None) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of brackets and commas around the rows: the bytes between two successive positions, exclusive, are a row.

    Raises:
        UserError: the file has no rows at `rows`, or is truncated.
    """
    start = _skip_space(file, len(BOM) if file.read(len(BOM)) == BOM else 0)
    opening = _byte(file, start)
    if (opening == b"[" and rows is None) or (opening == b"{" and rows == EVERY_KEY):
        yield from _whole_value(file, path, start)
    elif opening == b"{" and rows is not None:
        yield from _element_boundaries(file, path, _list_under_key(file, path, start, rows))
    elif opening == b"{":
        keys = [f"{key} ({_value_type(file, at)})" for key, at in _members(file, path, start, 8)]
        raise UserError(
            f"{path}: expected a list of rows, got an object with {', '.join(keys) or 'no keys'}; set `rows: KEY` in the data "
            "template to read the list under a key, or `rows: '*'` to read the value of every key as a row"
        )
    elif opening == b"[":
        raise UserError(f"{path}: `rows: {rows}` in the data template needs an object, got a list; remove the line")
    elif opening == b"":
        raise UserError(f"{path}: not valid JSON: the file is empty")
    elif _SCALAR.match(head := _head(file, start)):
        raise UserError(f"{path}: expected a list of rows, got {_value_type(file, start)}")
    else:
        file.seek(0)
        line = 1 + file.read(start).count(b"\n")
        first_line = head.decode("utf-8", "replace").split("\n")[0]
        raise UserError(f"{path}:{line}: not valid JSON: expected a list of objects, [{{...}}, ...], got {first_line!r}")


def _whole_value(file: BinaryIO, path: Path, start: int) -> Iterator[npt.NDArray[np.int64]]:
    end = start
    for boundaries in _element_boundaries(file, path, start):
        end = int(boundaries[-1])
        yield boundaries
    position = _skip_space(file, end + 1)
    if extra := _byte(file, position):
        hint = "; a file with one value per line is JSON Lines: rename it to .jsonl" if extra in (b"{", b"[") else ""
        raise UserError(f"{path}: not valid JSON: extra data after the first value, at byte {position}{hint}")


def _element_boundaries(file: BinaryIO, path: Path, start: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of the opening bracket at `start`, of the commas between its elements, and of the closing one.

    Only the opening bracket's partner if there are no elements. The elements themselves are parsed when a row is read.
    """
    opening = _byte(file, start)
    first = _skip_space(file, start + 1)
    if _byte(file, first) == (closing := {b"[": b"]", b"{": b"}"}[opening]):
        yield np.array([first], dtype=np.int64)
        return
    file.seek(start)
    depth, in_string, position, rest = 0, False, start, b""
    while chunk := file.read(CHUNK):
        chunk = rest + chunk
        complete = len(chunk.rstrip(b"\\"))  # a run of backslashes is not split between two chunks
        chunk, rest = chunk[:complete], chunk[complete:]
        data = np.frombuffer(chunk, dtype=np.uint8)
        marks = np.flatnonzero(np.frombuffer(chunk.translate(_STRUCTURAL), dtype=np.bool_))
        if b"\\" in chunk:
            marks = marks[~_escaped(data)[marks]]
        quotes = data[marks] == _QUOTE
        inside = np.bitwise_xor.accumulate(quotes) ^ in_string
        in_string = bool(inside[-1]) if len(inside) else in_string
        marks = marks[~quotes & ~inside]
        depths = depth + np.cumsum(_DEPTH_CHANGE[data[marks]], dtype=np.int64)
        depth = int(depths[-1]) if len(depths) else depth
        boundaries = marks[((depths == 1) & ((data[marks] == _COMMA) | (marks + position == start))) | (depths == 0)]
        closings = np.flatnonzero(depths == 0)
        if len(closings):
            end = int(marks[closings[0]])
            if chunk[end : end + 1] != closing:
                raise UserError(
                    f"{path}: not valid JSON: expected {closing.decode()!r} at byte {position + end} to close the bracket "
                    f"at byte {start}, got {chunk[end : end + 1].decode()!r}"
                )
            yield boundaries[boundaries <= end] + position
            return
        if len(boundaries):
            yield boundaries + position
        position += complete
    raise UserError(f"{path}: not valid JSON: the bracket at byte {start} is not closed; the file is truncated")


def _escaped(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """For each byte, whether it follows an odd number of backslashes."""
    slashes = np.flatnonzero(data == _BACKSLASH)
    apart = np.diff(slashes) != 1
    starts = slashes[np.concatenate([[True], apart])]
    ends = slashes[np.concatenate([apart, [True]])]
    escaped = np.zeros(len(data) + 1, dtype=np.bool_)
    escaped[ends[(ends - starts) % 2 == 0] + 1] = True
    return escaped[:-1]


def _members(file: BinaryIO, path: Path, start: int, limit: int | None = None) -> Iterator[tuple[str, int]]:
    """The keys of the object at `start`, each with the position of its value."""
    count, previous = 0, None
    for boundaries in _whole_value(file, path, start):
        for boundary in boundaries.tolist():
            if previous is not None and (limit is None or count < limit):
                position = file.tell()
                file.seek(previous + 1)
                head = file.read(min(_KEY_BYTES, boundary - previous - 1))
                file.seek(position)
                match, key = _KEY.match(head), _key(head)
                if match is None or key is None:
                    raise UserError(f"{path}: not valid JSON: expected a key and a value at byte {previous + 1}")
                yield key, previous + 1 + match.end()
                count += 1
            previous = boundary
        if count == limit:
            return


def _list_under_key(file: BinaryIO, path: Path, start: int, rows: str) -> int:
    """The position of the list under the key `rows`."""
    members = list(_members(file, path, start))
    positions = [at for key, at in members if key == rows]
    if not positions:
        raise UserError(f"{path}: the object has no key '{rows}'{nearest(rows, {key for key, _ in members})}")
    if len(positions) > 1:
        raise UserError(f"{path}: expected the key '{rows}' once, got it {len(positions)} times")
    if _byte(file, positions[0]) != b"[":
        raise UserError(f"{path}: expected a list of rows under the key '{rows}', got {_value_type(file, positions[0])}")
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


def _value_type(file: BinaryIO, position: int) -> str:
    offset = file.tell()
    first = _byte(file, position)
    file.seek(offset)
    return {b"[": "a list", b"{": "an object", b'"': "text"}.get(first, "a number, true, false or null" if first else "nothing")


def is_json_lines(path: Path) -> bool:
    """Whether a file, whatever its ending, has an object on its first line and another one after it, as POPE's `.json` files."""
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        if _byte(file, start) != b"{":  # most files are a list, which can be a single line
            return False
        file.seek(start)
        first = file.readline(MAX_ROW_BYTES)
        if _byte(file, _skip_space(file, file.tell())) != b"{":
            return False
    try:
        return isinstance(parse_json("", "", first), dict)
    except RowError:
        return False


class JsonLinesRows:
    """The rows of a JSON Lines file."""

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
            return _parse_line(self._name, self._lines[index], file.readline())


def stream_json_lines(path: Path, name: str) -> Iterator[LazyRow]:
    """Stream the same rows in order, read on demand."""
    with path.open("rb") as file:
        for number, line in enumerate(text_lines(file, path), start=1):
            if _has_row(number, line):
                yield partial(_parse_line, name, number, line)


def _has_row(number: int, line: bytes) -> bool:
    return not (line.isspace() or (number == 1 and not line.removeprefix(BOM).strip()))


def _parse_line(name: str, number: int, line: bytes) -> tuple[str, Row]:
    row_id = f"{name}:{number}"
    text = line.removeprefix(BOM) if number == 1 else line
    try:
        return row_id, expect_object(row_id, parse_json(row_id, "row", text))
    except RowError as error:
        if text.lstrip().startswith(b"["):
            detail = f"{error.detail}; a .jsonl file has one row per line; rename a file with one list to .json"
            raise RowError(row_id, error.field, detail, error.issue) from error
        raise
