"""Answers: held-out questions with their references and predictions, their scores, and the file that holds them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmtune.evaluation.metrics.intervals import confidence_interval
from mmtune.evaluation.metrics.metric import Item, Metric
from mmtune.evaluation.metrics.metric_table import find_metric


@dataclass(frozen=True)
class Answer:
    """A held-out question with its references and the model's prediction. A line of an answers file has the same keys.

    Attributes:
        id: the row id.
        task: the task that the row names, or None.
        images: paths or URIs of the question's images.
        references: all accepted answers; the first is the one that is shown.
        cluster: what the question is about: its image or document. Answers of one cluster are not independent.
        metric: the name of the metric that scores it.
        source: the name of the row's source; None if the recipe has one source.
        choices: all possible answers to a closed question, as text of the assistant.
        options: the texts of the options A, B, ... of a multiple-choice question.
        score: by the metric; 0 if the answer could not be parsed.
        parsed: whether the metric could parse the answer.
    """

    id: str
    task: str | None
    question: str
    images: tuple[str, ...]
    references: tuple[str, ...]
    prediction: str
    cluster: str
    metric: str
    source: str | None = None
    choices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    score: float = 0.0
    parsed: bool = True

    @property
    def group(self) -> str:
        """The group whose score the answer counts in: its task, or its source if the row names no task."""
        return self.task or self.source or "untitled"

    def item(self, answer_after: str | None = None) -> Item:
        """What the metric scores.

        Args:
            answer_after: only the text after the last occurrence of this counts, in the prediction and in the references.
        """
        row = {"question": self.question, "choices": self.choices, "options": self.options, "images": self.images, "id": self.id}
        references = tuple(final_answer(reference, answer_after) for reference in self.references)
        return Item(final_answer(self.prediction, answer_after), references, self.cluster, row)


@dataclass(frozen=True)
class Score:
    """The score of a group of answers by one metric.

    Attributes:
        task: the `group` of the answers, or `overall`.
        metric: its name.
        score: the headline number; unparsed answers count as 0.
        interval: its 95% confidence interval.
        unparsed: how many answers could not be parsed.
        clusters: how many images or documents the questions are about.
        baseline: the score of the majority-class baseline, which gives each group's most frequent reference as every answer; None
            where the metric has none.
        further: further numbers by name.
    """

    task: str
    metric: str
    questions: int
    score: float
    interval: tuple[float, float]
    unparsed: int
    clusters: int
    baseline: float | None
    further: dict[str, Any]


def final_answer(text: str, marker: str | None) -> str:
    """The text after the last `marker`, or the whole text if it has no marker; stripped."""
    return (text.rpartition(marker)[2] if marker else text).strip()


def score_answers(answers: Sequence[Answer], answer_after: str | None = None) -> list[Answer]:
    """The answers with `score` and `parsed` from their metrics.

    Raises:
        UserError: an unknown metric, or one whose function fails.
    """
    scored = list(answers)
    for name, indices in _by(answers, lambda answer: answer.metric).items():
        items = [answers[index].item(answer_after) for index in indices]
        for index, value in zip(indices, find_metric(name).score_all(items), strict=True):
            scored[index] = replace(answers[index], score=value or 0.0, parsed=value is not None)
    return scored


def group_scores(answers: Sequence[Answer], answer_after: str | None = None) -> list[Score]:
    """Scores of answers that have been scored: of each group in the order of first questions, then `overall`.

    With several metrics, for each metric in the order of first questions.
    """
    by_metric = _by(answers, lambda answer: answer.metric)
    scores = []
    for name, indices in by_metric.items():
        metric, own = find_metric(name), [answers[index] for index in indices]
        groups = _by(own, lambda answer: answer.group)
        items = [answer.item(answer_after) for answer in own]
        values = [answer.score if answer.parsed else None for answer in own]
        baseline = _baseline_items(metric, items, list(groups.values()))
        if len(groups) > 1 or len(by_metric) > 1:
            scores += [_group_score(group, metric, items, values, baseline, rows) for group, rows in groups.items()]
        scores.append(_group_score("overall", metric, items, values, baseline, range(len(own))))
    return scores


def _by(answers: Sequence[Answer], key: Any) -> dict[str, list[int]]:
    """Indices of the answers by a key, in the order of first answers."""
    indices: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        indices.setdefault(key(answer), []).append(index)
    return indices


def _baseline_items(metric: Metric, items: Sequence[Item], groups: Sequence[Sequence[int]]) -> list[Item] | None:
    """The items with the most frequent reference of their group as prediction."""
    if not metric.has_baseline:
        return None
    baseline = list(items)
    for rows in groups:
        texts = [reference for row in rows for reference in items[row].references]
        classes = [metric.normalize_class(text) for text in texts]
        [(most_frequent, _)] = Counter(classes).most_common(1)
        for row in rows:
            baseline[row] = replace(items[row], prediction=texts[classes.index(most_frequent)])
    return baseline


def _group_score(
    name: str,
    metric: Metric,
    items: Sequence[Item],
    values: Sequence[float | None],
    baseline: Sequence[Item] | None,
    rows: Sequence[int],
) -> Score:
    group, scores = [items[row] for row in rows], [values[row] for row in rows]
    statistics = metric.statistics(group, scores)
    clusters = [item.cluster for item in group]
    constant = None
    if baseline is not None:
        constant_items = [baseline[row] for row in rows]
        constant_statistics = metric.statistics(constant_items, metric.score_all(constant_items))
        constant = float(metric.headline(constant_statistics.sum(axis=0)))
    return Score(
        task=name,
        metric=metric.name,
        questions=len(group),
        score=float(metric.headline(statistics.sum(axis=0))),
        interval=confidence_interval(metric, statistics, clusters),
        unparsed=scores.count(None),
        clusters=len(set(clusters)),
        baseline=constant,
        further=metric.further(group, scores),
    )


def score_metrics(before: Sequence[Answer], after: Sequence[Answer], answer_after: str | None = None) -> dict[str, Any]:
    """The metrics of `summary.json` from the answers before and after tuning.

    `metric`, the score, its interval and the baseline stand at the top where all answers have one metric.

    Args:
        before: answers of the base; empty if it was not evaluated.
        after: answers of the tuned model.
        answer_after: as for `score_answers`.
    """
    tuned = group_scores(after, answer_after)
    metrics: dict[str, Any] = {"questions": len(after), "tuned_scores": scores_to_dicts(tuned)}
    one_metric = len({score.metric for score in tuned}) == 1
    if one_metric:
        overall = tuned[-1]
        metrics |= {"metric": overall.metric, "tuned_score": overall.score, "tuned_interval": overall.interval}
        metrics |= {} if overall.baseline is None else {"baseline": overall.baseline}
    if before:
        base = group_scores(before, answer_after)
        metrics["base_scores"] = scores_to_dicts(base)
        metrics |= {"base_score": base[-1].score, "base_interval": base[-1].interval} if one_metric else {}
    return metrics


def scores_to_dicts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores as JSON-serializable dicts, for `summary.json`."""
    return [asdict(item) for item in scores]


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as JSON lines, in the order of the questions."""
    path.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")


_LISTS = tuple(each.name for each in fields(Answer) if str(each.type).startswith("tuple"))


def read_answers(path: Path) -> list[Answer]:
    """Read answers that `write_answers` wrote."""
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+0085 and U+2028 inside an answer
        return [Answer(**{**row, **{name: tuple(row[name]) for name in _LISTS}}) for row in map(json.loads, lines)]
