"""Row types shared by all readers, and strict JSON parsing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mmtune.data.message import RowError
from mmtune.utils.errors import UserError

Row = dict[str, Any]

ID_FIELDS = ("id", "question_id", "questionId", "sample_id", "uid", "__key__")
"""Fields that commonly hold a row's id in its data set."""

TOOL_FIELDS = ("tools", "tool_calls", "function_call")
"""Columns and keys of turns with function schemas and tool calls."""

MAX_DEPTH = 100
"""Maximum nesting of lists and objects in a row's JSON, so that recursive code stays within Python's recursion limit."""

MAX_ROW_BYTES = 256 * 2**20
"""Maximum size of a row of a text file, and of a text member of a shard."""

LazyRow = Callable[[], tuple[str, Row]]
"""A row of a stream: returns the id and the row when called, so that skipped rows are never parsed. Raises RowError."""


class Rows(Protocol):
    """Rows by index, each with an id that names its file and position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id and the row.

        Raises:
            RowError: the row cannot be read.
        """
        ...


def drop_tool_padding(row: Row) -> Row:
    """An Arrow row without the null fields of its tool calls and function schemas, in columns and in lists of turns.

    All structs of an Arrow column have the same fields, so a call has the arguments of all other calls as null, and a schema the
    parameters of all others. Null values that the file's author wrote look the same.
    """
    for name, value in row.items():
        if name in TOOL_FIELDS:
            row[name] = _without_nulls(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                for key in TOOL_FIELDS:
                    if isinstance(item, dict) and item.get(key) is not None:
                        item[key] = _without_nulls(item[key])
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def id_in_dataset(row: Row) -> str | int | None:
    """The value of the first of `ID_FIELDS` that the row has; None if there is none, or it is not a text or an integer."""
    value = next((row[name] for name in ID_FIELDS if name in row), None)
    return value if isinstance(value, (str, int)) and value != "" else None


def parse_json(row_id: str, field: str, text: bytes) -> Any:
    """Parse a JSON value in UTF-8 strictly: what other parsers could read differently is an error.

    Raises:
        RowError: invalid JSON or UTF-8, NaN or Infinity, a number out of range, a duplicate key, or too deep nesting.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_reject_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        raise RowError(row_id, field, _json_error_message(error), "row_not_json") from error
    except UnicodeDecodeError as error:
        raise RowError(row_id, field, f"not valid JSON: {utf8_error_message(error)}", "row_not_json") from error
    except ValueError as error:  # a duplicate key, a number that is not finite, or one with thousands of digits
        raise RowError(row_id, field, f"not valid JSON: {error}", "row_not_json") from error
    except RecursionError as error:
        raise RowError(
            row_id, field, f"expected at most {MAX_DEPTH} levels of nested lists and objects, got more", "row_not_json"
        ) from error
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_too_deep(value):
        raise RowError(
            row_id, field, f"expected at most {MAX_DEPTH} levels of nested lists and objects, got more", "row_not_json"
        )
    return value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (list, dict)):
                inner.extend(item.values() if isinstance(item, dict) else item)
        level = inner
    return bool(level)


def text_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file.

    Raises:
        UserError: a line is longer than `MAX_ROW_BYTES`, as in a binary file.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise UserError(f"{path}:{number}: expected a row of at most {MAX_ROW_BYTES // 2**20} MiB, got a longer line")
        yield line


def utf8_error_message(error: UnicodeDecodeError) -> str:
    """The message for bytes that are not UTF-8."""
    before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
    return f"not valid UTF-8: byte {error.object[error.start]:#04x} after {before!r}; save the file as UTF-8"


def _json_error_message(error: json.JSONDecodeError) -> str:
    """The message for invalid JSON, with the position in the row; the caller knows the position in the file."""
    if error.msg == "Expecting value" and not error.doc[: error.pos].strip():
        return f"not valid JSON: expected an object {{...}}, got {error.doc.strip()[:60]!r}"
    around = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1} of the row, in {around!r}"


def expect_object(row_id: str, value: Any) -> Row:
    """The row, checked to be an object.

    Raises:
        RowError: the row is not an object.
    """
    if not isinstance(value, dict):
        raise RowError(row_id, "row", f"expected an object, got {type(value).__name__}", "row_not_object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:100]!r} in one object")
        result[key] = value
    return result


def _reject_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON value")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is out of the range of a float")
    return number
