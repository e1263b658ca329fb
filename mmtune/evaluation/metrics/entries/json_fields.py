"""Structured answers: the fields of a JSON object that are right."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mmtune.evaluation.metrics.answer_text import normalize
from mmtune.evaluation.metrics.metric import Array, Item, Metric, precision_recall_f1

_MAX_DEPTH = 100
_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)```", re.DOTALL | re.IGNORECASE)


class JsonFields(Metric):
    """F1 over the fields of a JSON object or list: a field is its path and its value.

    Texts are compared after `normalize`, numbers by value. The items of two lists are matched one to one so that most fields are
    right; their order does not count. The headline number is F1 over the fields of all answers together.
    """

    def problem(self, item: Item) -> str | None:
        """Every reference must be a JSON object or list."""
        wrong = [reference for reference in item.references if read_json(reference) is None]
        return f"expected a JSON object or list as reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """F1 of one answer, the best of the references; None if the answer has none, or several different ones."""
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

    def answer_class(self, item: Item) -> str:
        """The value with sorted keys."""
        return json.dumps(read_json(item.prediction), sort_keys=True)

    def _counts(self, item: Item) -> tuple[int, int, int]:
        """Right, extra and missing fields, for the reference with the best F1."""
        prediction = read_json(item.prediction)
        fields = 0 if prediction is None else _count_fields(prediction)
        options = []
        for reference in map(read_json, item.references):
            right = _right_fields(prediction, reference)
            options.append((right, fields - right, _count_fields(reference) - right))
        return max(options, key=lambda counts: precision_recall_f1(*counts)[2])


def read_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or list that a text is, or that its only code block is; None otherwise.

    NaN, Infinity, numbers too large for a float and repeated keys are not JSON; more than 100 levels are not read.
    """
    text = text.removeprefix("\ufeff")
    blocks = _FENCE.findall(text)
    for candidate in [text, *blocks] if len(blocks) == 1 else [text]:
        try:
            value = json.loads(candidate, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, (dict, list)) and _depth(value) <= _MAX_DEPTH:
            return value
    return None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not JSON")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def _children(value: Any) -> list[Any]:
    """The parts of an object or list; a leaf has none."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [child for each in level for child in _children(each)]:
        depth += 1
    return depth


def _count_fields(value: Any) -> int:
    """The number of leaves; an empty object or list is a leaf."""
    return sum(map(_count_fields, _children(value))) or 1


def _key(value: Any) -> Hashable:
    """Equal for values of which all fields are equal."""
    if isinstance(value, dict):
        return "object", frozenset((key, _key(item)) for key, item in value.items())
    if isinstance(value, list):
        return "list", frozenset(Counter(map(_key, value)).items())
    return ("text", normalize(value)) if isinstance(value, str) else (isinstance(value, bool), value)


def _right_fields(first: Any, second: Any) -> int:
    """The number of leaves with the same path and value, with the items of lists matched so that it is largest."""
    if isinstance(first, dict) and isinstance(second, dict) and first and second:
        return sum(_right_fields(first[key], second[key]) for key in first.keys() & second.keys())
    if isinstance(first, list) and isinstance(second, list) and first and second:
        return _right_items(first, second)
    return int(_key(first) == _key(second))


def _right_items(first: list[Any], second: list[Any]) -> int:
    from scipy.optimize import linear_sum_assignment

    keys = Counter(map(_key, first)) & Counter(map(_key, second))
    right, others = 0, list[list[Any]]()
    for items in (first, second):  # equal items are a pair in a largest matching, so only the others need the assignment
        equal = keys.copy()
        others.append([])
        for item in items:
            if equal[key := _key(item)]:
                equal[key] -= 1
                right += _count_fields(item) if items is first else 0
            elif _children(item):
                others[-1].append(item)
    overlaps = np.array([[_right_fields(one, other) for other in others[1]] for one in others[0]], dtype=np.float64)
    if not overlaps.size:
        return right
    return right + int(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum())


JSON_FIELDS = JsonFields(
    "json_fields",
    "F1 over the fields of a JSON object or list",
    "defined by mmtune",
    unparsed="is no JSON object or list, also not in a code block",
    has_baseline=False,
)
