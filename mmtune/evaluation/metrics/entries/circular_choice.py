"""Circular evaluation of multiple choice, MMBench's: a question is right if it is right in every order of its options."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmtune.evaluation.metrics.entries.closed_answers import MultipleChoice
from mmtune.evaluation.metrics.metric import Array, Item, ratio


class CircularChoice(MultipleChoice):
    """The share of questions whose passes are all right.

    The rows of a data set hold the passes: the same question about the same image, with the same options in another order. The
    score of an answer is that of its pass, as in `multiple_choice`; the headline counts questions. An unparsed answer is wrong.
    """

    def statistics(self, items: Sequence[Item], scores: Sequence[float | None]) -> Array:
        """Whether all passes of the question are right, and 1, each divided by the number of its passes."""
        passes: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, item in enumerate(items):
            passes[_question(item)].append(number)
        rows = np.zeros((len(items), 2))
        for numbers in passes.values():
            is_right = all(scores[number] == 1 for number in numbers)
            rows[numbers] = np.array([float(is_right), 1.0]) / len(numbers)
        return rows

    def headline(self, sums: Array) -> Array:
        """Right questions over questions."""
        return ratio(sums[..., 0], sums[..., 1])

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`circular_questions`, their number, and `single_pass`, the share of right answers, which is higher."""
        if not items:
            return {}
        questions = len({_question(item) for item in items})
        return {"circular_questions": questions, "single_pass": sum(score or 0.0 for score in scores) / len(scores)}


def _question(item: Item) -> tuple[Any, ...]:
    """What the passes of a question have in common: the image, the options in any order, and the lines without an option."""
    options = item.texts("options")
    lines = str(item.fields.get("question") or "").splitlines()
    others = tuple(line for line in lines if not any(line.endswith(option) for option in options))
    return item.cluster, tuple(sorted(options)), others


CIRCULAR_CHOICE = CircularChoice(
    "circular_choice",
    "multiple choice that is right in every order of the options",
    "MMBench's CircularEval (arXiv 2307.06281)",
    unparsed="states no option, or several",
    has_baseline=False,
    units={"circular_questions": ""},
)
