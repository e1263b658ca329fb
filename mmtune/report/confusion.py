"""Confusion matrices of closed questions: counts by the class of the reference and the class of the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmtune.evaluation.answers import Answer
from mmtune.evaluation.metrics.metric_table import recorded_metric

MAX_CLASSES = 12
"""A matrix has at most this many classes of references; questions with more are not closed."""
MIN_QUESTIONS = 3
"""A group has a matrix if its references have at least this many questions each on average."""
OTHER, UNPARSED = "(other)", "(unparsed)"
"""Columns that are not classes; `other` without parentheses can be a class."""


@dataclass(frozen=True)
class ConfusionTable:
    """Counts of answers.

    Attributes:
        title: the group and its metric.
        columns: classes of answers: those of the references, then `OTHER` and `UNPARSED` where there are any.
        rows: for each class of the references its counts by column.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[int]]]

    @property
    def largest(self) -> int:
        """The largest count."""
        return max(count for _, counts in self.rows for count in counts)


def confusion_tables(answers: Sequence[Answer]) -> list[ConfusionTable]:
    """The matrices of scored answers by metric and group, where scores are 0 or 1 and the references have few classes."""
    by_group: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        by_group.setdefault((answer.metric, answer.group), []).append(answer)
    tables = (_table(metric, group, own) for (metric, group), own in by_group.items())
    return [table for table in tables if table is not None]


def _table(metric_name: str, group: str, answers: Sequence[Answer]) -> ConfusionTable | None:
    metric = recorded_metric(metric_name)
    if not metric.proportion:
        return None
    counts: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        item = answer.item()
        reference = metric.answer_class(replace(item, prediction=item.references[0]))
        counts[reference, metric.answer_class(item) if answer.parsed else UNPARSED] += 1
    references = Counter(reference for reference, _ in counts.elements())
    if not 2 <= len(references) <= MAX_CLASSES or len(answers) < MIN_QUESTIONS * len(references):
        return None
    classes = sorted(references)
    predicted = {prediction for _, prediction in counts}
    columns = [*classes, *[OTHER] * bool(predicted - references.keys() - {UNPARSED}), *[UNPARSED] * (UNPARSED in predicted)]
    rows = []
    for reference in classes:
        own = Counter[str]()
        for (each, prediction), count in counts.items():
            if each == reference:
                own[prediction if prediction in references or prediction == UNPARSED else OTHER] += count
        rows.append((reference, [own[column] for column in columns]))
    return ConfusionTable(f"{group}, {metric_name}", columns, rows)
