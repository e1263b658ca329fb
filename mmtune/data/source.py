"""Rows of a JSON or JSON Lines file, by index, each with a stable id."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.data.message import RowError
from mmtune.errors import UserError

Row = dict[str, Any]


class JsonRows:
    """The rows of a `.json` file that holds one list. The whole file is read once."""

    def __init__(self, path: Path, name: str, where: str | None = None) -> None:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON, of UTF-8, or of a number with thousands of digits
            raise UserError(f"{path}: not valid JSON: {error}") from error
        if where == "*" and isinstance(rows, dict):
            rows = [{**row, "__key__": key} if isinstance(row, dict) else row for key, row in rows.items()]
        elif where is not None and isinstance(rows, dict):
            rows = rows.get(where)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}")
        self._name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `FILE[INDEX]` and the row."""
        row_id = f"{self._name}[{index}]"
        return row_id, _object(row_id, self._rows[index])


class JsonLinesRows:
    """The rows of a `.jsonl` file. Only the byte offsets of the lines are kept in memory; a row is parsed when asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._offsets = array("q")
        self._lines = array("q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `FILE:LINE` and the row."""
        row_id = f"{self._name}:{self._lines[index]}"
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RowError(row_id, "row", f"not valid JSON: {error}", "row_not_json") from error
        return row_id, _object(row_id, row)


Rows = JsonRows | JsonLinesRows


def _object(row_id: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise RowError(row_id, "row", f"expected an object, found {type(row).__name__}", "row_not_object")
    return row


def open_rows(path: str | Path, name: str | None = None, rows: str | None = None) -> Rows:
    """The rows of one file, by its ending.

    Args:
        path: a `.json` or `.jsonl` file.
        name: stands for the file in the rows' ids; None takes the file's own name.

    Raises:
        UserError: for a missing file, an unknown ending, a file that does not parse, or a file without rows.
    """
    path, where = Path(path), rows
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".json":
        found: Rows = JsonRows(path, name or path.name, where)
    elif path.suffix == ".jsonl":
        found = JsonLinesRows(path, name or path.name)
    else:
        raise UserError(f"{path}: cannot read '{path.suffix}' files; these can be read: .json, .jsonl")
    if len(found) == 0:
        raise UserError(f"{path}: holds no rows")
    return found


def stream_rows(path: str | Path, name: str | None = None, rows: str | None = None) -> Iterator[Callable[[], tuple[str, Row]]]:
    """The rows in turn."""
    found = open_rows(path, name, rows)
    for index in range(len(found)):
        yield partial(found.__getitem__, index)
