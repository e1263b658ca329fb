"""A metric: the score of one answer, the scores of a group of answers, and what a row must give for it.

`Metric` has a default for every hook but `score`. An entry is a subclass in a file of `entries/`, and one line of
`metric_table.py`. No entry imports torch or transformers.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Item:
    """An answer to score.

    Attributes:
        prediction: the model's answer.
        references: all accepted answers, at least one; an answer given by several people is in it several times.
        cluster: what the question is about, such as its image or document. Answers of one cluster are not independent.
        fields: further fields of the row by name, such as `options`, `choices` and `question`.
        missing_marker: the `answer_after` that the answer lacks; `prediction` is then empty, and unparsed.
    """

    prediction: str
    references: tuple[str, ...]
    cluster: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    missing_marker: str | None = None

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts; empty if the row has no such field."""
        return tuple(self.fields.get(name) or ())


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: in a recipe, a data template, and `mmtune score --metric`.
        about: what it measures, in one line.
        source: the paper or the scorer that defines it.
        unparsed: when a whole answer counts as unparsed; "never" if it always has a score.
        unparsed_score: what an unparsed answer counts as; that of an empty answer.
        greater_is_better: whether a higher score is better.
        proportion: whether every score is 0 or 1, so that the headline number is a proportion.
        percent: whether scores are shares of 1, and are shown in percent.
        has_baseline: whether the majority-class baseline means something.
        units: what is printed after a number of `further` that is not a share of 1.
    """

    name: str
    about: str
    source: str
    unparsed: str = "never"
    unparsed_score: float = 0.0
    greater_is_better: bool = True
    proportion: bool = False
    percent: bool = True
    has_baseline: bool = True
    units: Mapping[str, str] = field(default_factory=dict)

    def problem(self, item: Item) -> str | None:
        """What is wrong with the references or fields of an item, expected and got; None if it can be scored.

        It does not depend on the prediction, so that a data set is checked before any answer is generated.
        """
        return None

    def score(self, item: Item) -> float | None:
        """The score of one answer; None if it cannot be parsed. It is never guessed."""
        raise NotImplementedError

    def score_all(self, items: Sequence[Item]) -> list[float | None]:
        """The scores of all answers of a data set, for metrics in which an answer's score depends on the other rows."""
        return [self.score(item) for item in items]

    def score_items(self, items: Sequence[Item]) -> list[float | None]:
        """`score_all`, and None for answers without their `answer_after`. No metric replaces it."""
        return [value if item.missing_marker is None else None for item, value in zip(items, self.score_all(items), strict=True)]

    def statistics(self, items: Sequence[Item], scores: Sequence[float | None]) -> Array:
        """What `headline` sums: shape (items, k). By default the score and 1, so that the headline is the mean."""
        return np.array([(value or 0.0, 1.0) for value in scores], dtype=np.float64).reshape(-1, 2)

    def headline(self, sums: Array) -> Array:
        """The headline number from sums of `statistics`: shape (..., k) to (...). NaN for sums over no item."""
        return ratio(sums[..., 0], sums[..., 1])

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """Further numbers of a group by name, JSON-serializable."""
        return {}

    def is_right(self, score: float) -> bool:
        """Whether an answer with this score is shown as right."""
        return score >= 0.5 if self.greater_is_better else score < 0.5

    def normalize_class(self, text: str) -> str:
        """The form in which two references are the same class, for the majority-class baseline."""
        return text.strip()

    def answer_class(self, item: Item) -> str:
        """The form in which two parsed answers to a row are the same, for a vote."""
        return " ".join(self.normalize_class(item.prediction).casefold().split())


def finite_number(value: Any) -> float | None:
    """A finite real number as a float, also one of numpy; None for anything else."""
    try:
        number = float(value) if isinstance(value, (numbers.Real, np.bool_)) else math.nan
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def ratio(numerator: Array, denominator: Array) -> Array:
    """Elementwise quotient; NaN where the denominator is 0."""
    empty = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=empty, where=denominator != 0)


def precision_recall_f1(true_positives: int, false_positives: int, false_negatives: int) -> tuple[float, float, float]:
    """Precision, recall and their harmonic mean; 0 where a denominator is 0."""
    predicted, actual = true_positives + false_positives, true_positives + false_negatives
    f1_denominator = predicted + actual
    return (
        true_positives / predicted if predicted else 0.0,
        true_positives / actual if actual else 0.0,
        2 * true_positives / f1_denominator if f1_denominator else 0.0,
    )
