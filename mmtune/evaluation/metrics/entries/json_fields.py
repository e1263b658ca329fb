"""Structured answers: the fields of a JSON object that are right."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmtune.evaluation.metrics.entries.text_match import normalize
from mmtune.evaluation.metrics.metric import Array, Item, Metric, precision_recall_f1

_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)```", re.DOTALL | re.IGNORECASE)


class JsonFields(Metric):
    """F1 over the fields of a JSON object: a field is its path and its value.

    Texts are compared after `normalize`, numbers by value; the order of lists does not count. The headline number is F1 over the
    fields of all answers together.
    """

    def problem(self, item: Item) -> str | None:
        """Every reference must be a JSON object or list."""
        wrong = [reference for reference in item.references if read_json(reference) is None]
        return f"expected a JSON object as reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """F1 of one answer, the best of the references; None if the answer has no JSON object, or several different ones."""
        counts = self._counts(item)
        return None if read_json(item.prediction) is None else precision_recall_f1(*counts)[2]

    def statistics(self, items: Sequence[Item], scores: Sequence[float | None]) -> Array:
        """Twice the right fields, and the fields of answer and reference together: shape (items, 2)."""
        counts = [self._counts(item) for item in items]
        return np.array([(2 * right, 2 * right + extra + missing) for right, extra, missing in counts], dtype=float).reshape(
            -1, 2
        )

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`precision` and `recall` of fields, and `all_fields`, the share of answers with every field right and no other."""
        counts = [self._counts(item) for item in items]
        precision, recall, _ = (
            precision_recall_f1(*(sum(column) for column in zip(*counts, strict=True))) if counts else (0, 0, 0)
        )
        return {"precision": precision, "recall": recall, "all_fields": scores.count(1.0) / len(scores)} if scores else {}

    def _counts(self, item: Item) -> tuple[int, int, int]:
        """Right, extra and missing fields, for the reference with the best F1."""
        predicted = Counter(_fields(read_json(item.prediction)))
        options = []
        for reference in item.references:
            expected = Counter(_fields(read_json(reference)))
            right = (predicted & expected).total()
            options.append((right, predicted.total() - right, expected.total() - right))
        return max(options, key=lambda counts: precision_recall_f1(*counts)[2])


def read_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or list that a text is, or that its only code block is; None otherwise.

    NaN, Infinity and repeated keys are not JSON.
    """
    blocks = _FENCE.findall(text)
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of every leaf; an empty object or list is a leaf. The items of a list share a path."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, (*path, key))
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, (*path, "[]"))
    elif isinstance(value, str):
        yield path, normalize(value)
    elif value is not None or path:
        yield path, (type(value).__name__, repr(value)) if isinstance(value, (dict, list, bool)) else value


JSON_FIELDS = JsonFields(
    "json_fields",
    "F1 over the fields of a JSON object",
    "defined by mmtune",
    unparsed="is no JSON object, also not in a code block",
    has_baseline=False,
)
