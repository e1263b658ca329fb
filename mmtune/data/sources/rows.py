"""What every source of rows gives, and JSON as all of them read it."""

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
"""Fields by which rows are known in their own data set."""

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row's JSON. Code that walks or prints a value recurses within Python's limit."""

MAX_ROW_BYTES = 256 * 2**20
"""Longest row of a text file, and longest text of a shard's row."""

LazyRow = Callable[[], tuple[str, Row]]
"""One row of a stream: its id and the row when called, so that a row that is skipped is never parsed. Raises RowError."""


class Rows(Protocol):
    """Rows by index, each with an id that a person can find again."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id and the row.

        Raises:
            RowError: a row that cannot be read.
        """
        ...


def id_in_dataset(row: Row) -> str | int | None:
    """The id by which a row is known in its own data set; None where it has none."""
    given = next((row[name] for name in ID_FIELDS if name in row), None)
    return given if isinstance(given, (str, int)) and given != "" else None


def parse_json(row_id: str, field: str, text: bytes) -> Any:
    """A JSON value in UTF-8, read strictly: a row that another reader could take for something else is refused.

    Raises:
        RowError: no JSON or no UTF-8, NaN or Infinity, a number no float holds, a key that comes twice, or too deep a nesting.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise RowError(row_id, field, _not_json(error), "row_not_json") from error
    except UnicodeDecodeError as error:
        raise RowError(row_id, field, f"not valid JSON: {utf8_error_message(error)}", "row_not_json") from error
    except ValueError as error:  # a key that comes twice, no finite number, or one with thousands of digits
        raise RowError(row_id, field, f"not valid JSON: {error}", "row_not_json") from error
    except RecursionError as error:
        raise RowError(row_id, field, f"nested too deeply, more than {MAX_DEPTH} levels", "row_not_json") from error
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_too_deep(value):
        raise RowError(row_id, field, f"nested too deeply, more than {MAX_DEPTH} levels", "row_not_json")
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
        UserError: a line longer than a row may be, as in a binary file.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise UserError(f"{path}:{number}: a line of more than {MAX_ROW_BYTES // 2**20} MiB, the longest row that is read")
        yield line


def utf8_error_message(error: UnicodeDecodeError) -> str:
    """What to say of bytes that are not UTF-8."""
    before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
    return f"not valid UTF-8: byte {error.object[error.start]:#04x} behind {before!r}; save the file as UTF-8"


def _not_json(error: json.JSONDecodeError) -> str:
    """What is wrong with a text; where it stands in the file only its reader knows."""
    if error.msg == "Expecting value" and not error.doc[: error.pos].strip():
        return f"not JSON: the text is {error.doc.strip()[:60]!r}, expected an object {{...}}"
    around = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1} of the row, in {around!r}"


def expect_object(row_id: str, value: Any) -> Row:
    """
    Raises:
        RowError: for a row that is no object.
    """
    if not isinstance(value, dict):
        raise RowError(row_id, "row", f"expected an object, found {type(value).__name__}", "row_not_object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:100]!r} comes twice in one object")
        made[key] = value
    return made


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is larger than any float")
    return number
