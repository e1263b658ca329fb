"""Answers files: JSON Lines, one answer a line, of an evaluation or made elsewhere. Reading one runs no code that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mmtune.evaluation.answers import Answer
from mmtune.evaluation.metrics.metric import Metric, finite_number
from mmtune.evaluation.metrics.metric_table import recorded_metric
from mmtune.utils.errors import UserError, reason_of
from mmtune.utils.files import replace_bytes

MAX_ERRORS = 10
"""How many faulty lines an error lists."""


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """Replace a file atomically by answers, in the order of the questions."""
    lines = []
    for answer in answers:
        row = asdict(answer)
        lines.append(json.dumps({**row.pop("extra"), **row}, ensure_ascii=False) + "\n")
    # A file name that is not UTF-8 has lone surrogates in Python, which are valid JSON as escapes \udcXX.
    replace_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))


def read_answers(path: Path, metric: Metric | None = None, answer_after: str | None = None) -> list[Answer]:
    """Read the answers of a file. Blank lines are skipped; a null or empty value is as no such key.

    A line has `prediction` and `references`; `id` and `cluster` default to the line's number. Without a metric given it also has
    `id`, `metric` and `score`. Keys that are not read are in `extra`.

    Args:
        metric: what will score the answers; scores in the file are not read. None: they are.
        answer_after: replaces that of every line.

    Raises:
        UserError: the file cannot be read; or lines that are wrong or that their metric cannot score, by number and key.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would also split at U+2028 inside an answer
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at position {error.start}"
        raise UserError(f"{path}: expected JSON Lines in UTF-8, got byte {byte}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from error
    answers: list[Answer] = []
    errors: list[str] = []
    numbers: dict[tuple[str | None, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not numbers and not errors and not re.match(r"\s*{\s*\S", line):
            raise UserError(f"{path}:{number}: expected JSON Lines, a JSON object on each line, got {line[:40]!r}")
        try:
            answer = _read_line(line, number, metric, answer_after)
            first = numbers.setdefault((answer.source, answer.id), number)
            if first != number:
                raise ValueError(f"id: expected another one than in line {first}, got {answer.id[:80]!r} again")
        except (ValueError, UserError) as error:
            errors.append(f"{path}:{number}: {error}")
        else:
            answers.append(answer)
    if errors:
        more = [f"... and {len(errors) - MAX_ERRORS} more lines"] if len(errors) > MAX_ERRORS else []
        raise UserError("\n".join([*errors[:MAX_ERRORS], *more]))
    return answers


def _read_line(line: str, number: int, metric: Metric | None, answer_after: str | None) -> Answer:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got text that is not JSON: {reason_of(error)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    required = ("prediction", "references") if metric else ("prediction", "references", "id", "metric", "score")
    keys = [name for name in _KEYS if metric is None or name not in _SCORE_KEYS]
    values: dict[str, Any] = {"id": str(number), "cluster": f"line {number}", "task": None, "question": "", "images": ()}
    for name in keys:
        if name not in required and row.get(name) in (None, ""):
            continue
        expected, read = _KEYS[name]
        values[name] = read(row.get(name))
        if values[name] is None or (name == "references" and not values[name]):
            keys_of_line = f"no such key; the line has {', '.join(row)[:200] or 'none'}"
            shown = json.dumps(row[name], ensure_ascii=False)[:80] if name in row else keys_of_line
            raise ValueError(f"{name}: expected {expected}, got {shown}{_text_hint(expected, row.get(name))}")
    if metric:
        values["metric"] = metric.name
    if answer_after is not None:
        values["answer_after"] = answer_after
    answer = Answer(**values, extra={name: value for name, value in row.items() if name not in keys})
    used = metric or recorded_metric(answer.metric)
    if (problem := used.problem(answer.item())) is not None:
        raise ValueError(f"references: {problem} (metric {used.name})")
    if not metric and (possible := _expected_score(used, answer)) is not None:
        raise ValueError(f"score: expected {possible} (metric {used.name}), got {answer.score:g}")
    return answer


def _text_hint(expected: str, value: Any) -> str:
    """How to write numbers, or one text, as a list of texts."""
    values = value if isinstance(value, list) else [value]
    if expected != _KINDS["tuple[str, ...]"][0] or not values or not all(isinstance(each, (str, int, float)) for each in values):
        return ""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in values]
    return f"; write {json.dumps(texts, ensure_ascii=False)[:80]}"


def _expected_score(metric: Metric, answer: Answer) -> str | None:
    """The scores that a metric can give, if that of the answer is not one of them."""
    if not answer.parsed:
        return None if answer.score == metric.unparsed_score else f"{metric.unparsed_score:g}, because parsed is false"
    if metric.proportion:
        return None if answer.score in (0, 1) else "0 or 1"
    highest = 1 if metric.percent and metric.greater_is_better else float("inf")
    in_range = not metric.percent or 0 <= answer.score <= highest + 1e-6  # rounding
    return None if in_range else f"a number from 0 to {highest:g}"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _name(value: Any) -> str | None:
    return str(value) if (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool)) else None


def _texts(value: Any) -> tuple[str, ...] | None:
    return tuple(value) if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


def _number(value: Any) -> float | None:
    return None if isinstance(value, bool) else finite_number(value)


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Also infinities and NaN, which the log-likelihoods of a model that diverged can be."""
    if not isinstance(value, list) or not all(isinstance(each, float) or _number(each) is not None for each in value):
        return None
    return tuple(map(float, value))


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _texts_by_name(value: Any) -> dict[str, str] | None:
    return value if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()) else None


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("a text", _text),
    "str | None": ("a text", _text),
    "tuple[str, ...]": ("a list of texts", _texts),
    "float": ("a finite number", _number),
    "bool": ("true or false", _flag),
    "tuple[float, ...]": ("a list of numbers", _numbers),
    "Mapping[str, str]": ("an object of texts", _texts_by_name),
}
"""By the type of an attribute of `Answer`: what its value in a file must be, and a function that returns None for another one."""
_NAMES = ("id", "task", "source", "cluster")
_KEYS = {
    each.name: ("a text or an integer", _name) if each.name in _NAMES else _KINDS[str(each.type)]
    for each in fields(Answer)
    if each.name != "extra"
}
_SCORE_KEYS = ("metric", "score", "parsed", "near_tie", "sampled", "choice_scores")
