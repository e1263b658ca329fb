"""What every source of rows gives, and JSON as all of them read it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Protocol

from mmtune.data.message import RowError

Row = dict[str, Any]

Item = Callable[[], tuple[str, Row]]
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


def parse_json(row_id: str, field: str, text: bytes) -> Any:
    """A JSON value in UTF-8, read strictly: a row that another reader could take for something else is refused.

    Raises:
        RowError: no JSON or no UTF-8, NaN or Infinity, a number no float holds, a key that comes twice, or too deep a nesting.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except ValueError as error:  # of JSON, of UTF-8, or of a number with thousands of digits
        raise RowError(row_id, field, f"not valid JSON: {error}", "row_not_json") from error
    except RecursionError as error:
        raise RowError(row_id, field, "not valid JSON: nested too deeply", "row_not_json") from error


def object_of(row_id: str, value: Any) -> Row:
    """
    Raises:
        RowError: for a row that is no object.
    """
    if not isinstance(value, dict):
        raise RowError(row_id, "row", f"expected an object, found {type(value).__name__}", "row_not_object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice in one object")
    return made


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is larger than any float")
    return number
