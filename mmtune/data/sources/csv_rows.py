"""Rows of CSV and TSV files. A quoted field may hold line breaks, so records are indexed, and not lines."""

from __future__ import annotations

import csv
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from mmtune.data.message import RowError
from mmtune.data.sources.rows import MAX_ROW_BYTES, LazyRow, Row, text_lines, utf8_error_message
from mmtune.utils.errors import UserError

_BATCH = 256  # records that are found before the first of them is given
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class CsvRows:
    """The rows of a file whose first record names the columns. Every value is text."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._delimiter = DELIMITERS[path.suffix.lower()]
        self._starts = array("q")
        self._ends = array("q")
        self._lines = array("q")
        with path.open("rb") as file:
            records = _records(file, path, self._delimiter)
            self._columns = _header(path, self._delimiter, records)
            for line, start, record in records:
                self._lines.append(line)
                self._starts.append(start)
                self._ends.append(start + len(record))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `FILE:LINE`, of the record's first line, and the row."""
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            record = file.read(self._ends[index] - self._starts[index])
        return _row(self._name, self._lines[index], self._columns, self._delimiter, record)


def stream_csv(path: Path, name: str) -> Iterator[LazyRow]:
    """The same rows in order, read as they are asked for."""
    delimiter = DELIMITERS[path.suffix.lower()]
    with path.open("rb") as file:
        records = _records(file, path, delimiter)
        columns = _header(path, delimiter, records)
        for line, _, record in records:
            yield partial(_row, name, line, columns, delimiter, record)


def _records(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, int, bytes]]:
    """Each record's first line, its offset in the file and its bytes; blank lines are none.

    The bytes are read as Latin-1, which leaves commas, quotes and line breaks where they are and never fails: a row that is not
    UTF-8 is that row's fault and not the file's.

    Raises:
        UserError: for a quoted field that never ends, which takes all the rest of the file with it.
    """
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        size = 0
        for line in text_lines(file, path):
            size = len(line) + (size if taken else 0)
            if size > MAX_ROW_BYTES:
                reason = f"a quote in this row is not closed within {MAX_ROW_BYTES // 2**20} MiB"
                raise UserError(f"{path}:{reader.line_num - len(taken) + 1}: {reason}")
            taken.append(line)
            yield line.decode("latin-1")

    reader = csv.reader(lines(), delimiter=delimiter)

    def records() -> Iterator[tuple[int, int, list[bytes], bool]]:
        line, offset = 1, 0
        for fields in reader:
            yield line, offset, taken.copy(), bool(fields)
            line, offset = line + len(taken), offset + sum(map(len, taken))
            taken.clear()

    found = records()
    held: tuple[int, int, list[bytes]] | None = None
    while True:
        try:
            with _long_fields():
                batch = list(islice(found, _BATCH))
        except csv.Error as error:  # a carriage return alone, as very old line ends
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
        for line, offset, lines_of, filled in batch:
            if held is not None:
                yield held[0], held[1], b"".join(held[2])
            held = (line, offset, lines_of) if filled else None
        if not batch:
            break
    if held is not None:
        _check_closed(path, delimiter, *held)
        yield held[0], held[1], b"".join(held[2])


def _check_closed(path: Path, delimiter: str, line: int, offset: int, lines: list[bytes]) -> None:
    if len(lines) > 1:  # one line is no fault but its own row's
        try:
            _parse(b"".join(lines).decode("latin-1"), delimiter)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: a quote in this row is never closed, and takes all that follows") from error


def _parse(record: str, delimiter: str) -> list[str]:
    with _long_fields():
        return next(csv.reader([record], delimiter=delimiter, strict=True), [])


def _header(path: Path, delimiter: str, records: Iterator[tuple[int, int, bytes]]) -> list[str]:
    _, _, record = next(records, (0, 0, b""))
    try:
        columns = _parse(record.decode("utf-8-sig"), delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        reason = utf8_error_message(error) if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path}: cannot read its first line, the names of the columns: {reason}") from error
    other = next((each for each in ";\t|," if each != delimiter and each in columns[0]), None) if len(columns) == 1 else None
    if other is not None:
        raise UserError(
            f"{path}: its first line is one column, {columns[0]!r}: {delimiter!r} separates columns in a {path.suffix} file, and "
            f"this one seems to use {other!r}; save it with {delimiter!r}"
        )
    twice = sorted(column for column, count in Counter(columns).items() if count > 1)
    if twice or not all(column.strip() for column in columns):
        fault = f"two columns are named '{twice[0]}'" if twice else "a column has no name"
        raise UserError(f"{path}: {fault}; the first line names every column once")
    return columns


def _row(name: str, line: int, columns: list[str], delimiter: str, record: bytes) -> tuple[str, Row]:
    row_id = f"{name}:{line}"
    try:
        fields = _parse(record.decode("utf-8"), delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        reason = utf8_error_message(error) if isinstance(error, UnicodeDecodeError) else error
        raise RowError(row_id, "row", f"not valid CSV: {reason}", "row_malformed") from error
    if len(fields) != len(columns):
        raise RowError(row_id, "row", f"{len(fields)} fields for {len(columns)} columns", "row_malformed")
    return row_id, dict(zip(columns, fields, strict=True))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields as long as they come, an image in base64 among them. Python bounds them for the whole process, by a setting."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
