"""Metrics of numbers: ChartQA's relaxed accuracy, and equality of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mmtune.evaluation.metrics.entries.text_match import plain
from mmtune.evaluation.metrics.metric import Item, Metric

RELAXED_TOLERANCE = 0.05
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w]|[.,]\d)")


class RelaxedAccuracy(Metric):
    """A number within 5% of the reference; other answers must be equal, case aside.

    `12%` is the number 0.12, as in the published scorer. A reference of 0 is compared as text.
    """

    def score(self, item: Item) -> float:
        """1 or 0; the best of the references."""
        return float(any(_relaxed_match(item.prediction, reference) for reference in item.references))


def _relaxed_match(prediction: str, reference: str) -> bool:
    predicted, expected = _as_number(prediction), _as_number(reference)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == reference.lower()


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


class Numeric(Metric):
    """The number in the answer equals the number in a reference, up to rounding errors of floating point."""

    def problem(self, item: Item) -> str | None:
        """Every reference must have exactly one number."""
        wrong = [reference for reference in item.references if read_number(reference) is None]
        return f"expected one number in every reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer has no number, or several different ones."""
        number = read_number(item.prediction)
        if number is None:
            return None
        return float(any(_equal(number, read_number(reference)) for reference in item.references))

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`within_5_percent`: the share of answers within 5% of a reference; `mean_absolute_error` of the parsed answers."""
        errors, close = [], 0
        for item in items:
            number, expected = read_number(item.prediction), [read_number(reference) for reference in item.references]
            differences = [(abs(number - each), abs(each)) for each in expected if number is not None and each is not None]
            if differences:
                errors.append(min(difference for difference, _ in differences))
                close += any(difference <= RELAXED_TOLERANCE * size for difference, size in differences)
        numbers: dict[str, Any] = {"within_5_percent": close / len(items)} if items else {}
        return numbers | ({"mean_absolute_error": math.fsum(errors) / len(errors)} if errors else {})

    def normalize_class(self, text: str) -> str:
        """The number."""
        return repr(read_number(text))


def read_number(text: str) -> float | None:
    """The only number in a text; None if it has none, or several different ones.

    A comma separates groups of three digits. `1.5e3` is a number. A sign in front counts; so does the minus sign U+2212.
    """
    numbers = {float(match.replace(",", "")) for match in _NUMBER.findall(plain(text))}
    number = numbers.pop() if len(numbers) == 1 else math.nan
    return number if math.isfinite(number) else None


def _equal(number: float, reference: float | None) -> bool:
    return reference is not None and math.isclose(number, reference, rel_tol=1e-9, abs_tol=1e-12)


RELAXED_ACCURACY = RelaxedAccuracy(
    "relaxed_accuracy",
    "a number within 5% of the reference, or an equal text",
    "ChartQA (arXiv 2203.10244, section 5.1)",
    proportion=True,
)
NUMERIC = Numeric(
    "numeric",
    "the number in the answer equals the reference",
    "defined by mmtune",
    unparsed="no number, or several different ones",
    proportion=True,
)
