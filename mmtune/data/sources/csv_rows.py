"""Rows of CSV and TSV files. A quoted field may contain line breaks, so the index is of records, not of lines."""

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

_BATCH = 256  # records that are parsed together
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
    """Stream the same rows in order, read on demand."""
    delimiter = DELIMITERS[path.suffix.lower()]
    with path.open("rb") as file:
        records = _records(file, path, delimiter)
        columns = _header(path, delimiter, records)
        for line, _, record in records:
            yield partial(_row, name, line, columns, delimiter, record)


def _records(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, int, bytes]]:
    """The first line number, the file offset and the bytes of each record; blank lines are skipped.

    The bytes are decoded as Latin-1, which keeps commas, quotes and line breaks and never fails, so that a row with invalid
    UTF-8 is an error of that row alone.

    Raises:
        UserError: a quoted field is not closed, so that the rest of the file would be part of it.
    """
    pending: list[bytes] = []

    def lines() -> Iterator[str]:
        size = 0
        for line in text_lines(file, path):
            size = len(line) + (size if pending else 0)
            if size > MAX_ROW_BYTES:
                reason = f"a quote in this row is not closed within {MAX_ROW_BYTES // 2**20} MiB; close it"
                raise UserError(f"{path}:{reader.line_num - len(pending) + 1}: {reason}")
            pending.append(line)
            yield line.decode("latin-1")

    reader = csv.reader(lines(), delimiter=delimiter)

    def records() -> Iterator[tuple[int, int, list[bytes], bool]]:
        line, offset = 1, 0
        for fields in reader:
            yield line, offset, pending.copy(), bool(fields)
            line, offset = line + len(pending), offset + sum(map(len, pending))
            pending.clear()

    remaining = records()
    previous: tuple[int, int, list[bytes]] | None = None
    while True:
        try:
            with _long_fields():
                batch = list(islice(remaining, _BATCH))
        except csv.Error as error:  # a single carriage return, as in very old line ends
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
        for line, offset, record_lines, has_fields in batch:
            if previous is not None:
                yield previous[0], previous[1], b"".join(previous[2])
            previous = (line, offset, record_lines) if has_fields else None
        if not batch:
            break
    if previous is not None:
        _check_closed(path, delimiter, *previous)
        yield previous[0], previous[1], b"".join(previous[2])


def _check_closed(path: Path, delimiter: str, line: int, offset: int, lines: list[bytes]) -> None:
    if len(lines) > 1:  # an unclosed quote within one line is an error of that row alone
        try:
            _parse(b"".join(lines).decode("latin-1"), delimiter)
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: a quote in this row is not closed, so that the rest of the file is part of it; close it"
            ) from error


def _parse(record: str, delimiter: str) -> list[str]:
    with _long_fields():
        return next(csv.reader([record], delimiter=delimiter, strict=True), [])


def _header(path: Path, delimiter: str, records: Iterator[tuple[int, int, bytes]]) -> list[str]:
    _, _, record = next(records, (0, 0, b""))
    try:
        columns = _parse(record.decode("utf-8-sig"), delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        reason = utf8_error_message(error) if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path}: cannot read the column names in the first line: {reason}") from error
    other = next((each for each in ";\t|," if each != delimiter and each in columns[0]), None) if len(columns) == 1 else None
    if other is not None:
        raise UserError(
            f"{path}: expected columns separated by {delimiter!r} in a {path.suffix} file, got one column {columns[0]!r}; the "
            f"separator seems to be {other!r}; save the file with {delimiter!r}"
        )
    duplicates = sorted(column for column, count in Counter(columns).items() if count > 1)
    if duplicates or not all(column.strip() for column in columns):
        problem = f"two columns are named '{duplicates[0]}'" if duplicates else "a column has no name"
        raise UserError(f"{path}: {problem}; the first line must give every column its own name")
    return columns


def _row(name: str, line: int, columns: list[str], delimiter: str, record: bytes) -> tuple[str, Row]:
    row_id = f"{name}:{line}"
    try:
        fields = _parse(record.decode("utf-8"), delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        reason = utf8_error_message(error) if isinstance(error, UnicodeDecodeError) else error
        raise RowError(row_id, "row", f"not valid CSV: {reason}", "row_malformed") from error
    if len(fields) != len(columns):
        raise RowError(row_id, "row", f"expected {len(columns)} fields, one for each column, got {len(fields)}", "row_malformed")
    return row_id, dict(zip(columns, fields, strict=True))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow fields of any length (an image in base64, for example). Python's limit is a setting of the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
