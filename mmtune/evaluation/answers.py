"""Answers: held-out questions with their references and predictions, and their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from mmtune.evaluation.metrics.intervals import confidence_interval
from mmtune.evaluation.metrics.metric import Array, Item, Metric
from mmtune.evaluation.metrics.metric_table import find_metric, recorded_metric

Key = TypeVar("Key", bound=Hashable)


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
        answer_after: only the text after its last occurrence counts, in the prediction and in the references; None: all text.
        choices: all possible answers to a closed question, as text of the assistant.
        options: the texts of the options A, B, ... of a multiple-choice question.
        score: by the metric; its `unparsed_score` if the answer could not be parsed.
        parsed: whether the metric could parse the answer.
        near_tie: whether rounding could change the prediction (`mmtune.evaluation.predictions.prediction`).
        sampled: all answers if several were sampled; `prediction` is the most frequent one.
        choice_scores: the log-likelihood of each of `choices`, with `evaluate.score: choices`.
        groups: the values of the row's fields in `evaluate.groups`, by field.
        extent: the coordinates of the image's lower right corner, in the convention of the regions in references and prediction;
            empty if it is not known.
        extra: further keys of a line that was made elsewhere, for a metric that is a function.
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
    answer_after: str | None = None
    choices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    score: float = 0.0
    parsed: bool = True
    near_tie: bool = False
    sampled: tuple[str, ...] = ()
    choice_scores: tuple[float, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    extent: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The group whose score the answer counts in: its task, or its source if the row names no task."""
        name = self.task or self.source or "untitled"
        return name if name != "overall" else "overall (task)"  # `overall` is the score of all groups

    def item(self) -> Item:
        """What the metric scores: the texts after `answer_after`.

        A prediction without it is empty; a reference without it counts as a whole.
        """
        names = ("id", "task", "source", "question", "images", "choices", "options")
        row = {**self.extra, **{name: getattr(self, name) for name in names}}
        answer, *finals = (final_answer(text, self.answer_after) for text in (self.prediction, *self.references))
        references = [text.strip() if final is None else final for text, final in zip(self.references, finals, strict=True)]
        return Item(answer or "", tuple(references), self.cluster, row, self.answer_after if answer is None else None)


@dataclass(frozen=True)
class Score:
    """The score of a group of answers by one metric.

    Attributes:
        task: the `group` of the answers, or `overall`.
        metric: its name.
        score: the headline number; unparsed answers count as the metric's `unparsed_score`.
        interval: its 95% confidence interval; None where it has none, see `confidence_interval`.
        unparsed: how many answers could not be parsed.
        missing_markers: each `answer_after` that answers lack; they are unparsed.
        clusters: how many images or documents the questions are about.
        baseline: the score of the majority-class baseline, which gives each group's most frequent reference as every answer; None
            where the metric has none.
        further: further numbers by name.
    """

    task: str
    metric: str
    questions: int
    score: float
    interval: tuple[float, float] | None
    unparsed: int
    missing_markers: tuple[str, ...]
    clusters: int
    baseline: float | None
    further: dict[str, Any]


def final_answer(text: str, marker: str | None) -> str | None:
    """The text after the last `marker`, stripped; None if the text lacks it. The whole text if `marker` is None."""
    if not marker:
        return text.strip()
    return text.rpartition(marker)[2].strip() if marker in text else None


def score_answers(answers: Sequence[Answer]) -> list[Answer]:
    """The answers with `score` and `parsed` from their metrics. Each source is a data set of its own (`Metric.score_items`).

    Raises:
        UserError: an unknown metric, or one whose function fails.
    """
    scored = list(answers)
    for (name, _), indices in _by([(answer.metric, answer.source) for answer in answers]).items():
        items = [answers[index].item() for index in indices]
        metric = find_metric(name)
        for index, value in zip(indices, metric.score_items(items), strict=True):
            score = metric.unparsed_score if value is None else value
            scored[index] = replace(answers[index], score=score, parsed=value is not None)
    return scored


def statistics_of(metric: Metric, answers: Sequence[Answer]) -> Array:
    """`Metric.statistics` of answers that have been scored, shape (answers, k)."""
    return metric.statistics([each.item() for each in answers], [each.score if each.parsed else None for each in answers])


def of_benchmark(answers: Sequence[Answer], task: str) -> list[Answer]:
    """The answers with the name of an evaluation task, as the key `benchmark` of their lines."""
    return [replace(answer, extra={"benchmark": task}) for answer in answers]


def group_scores(answers: Sequence[Answer]) -> list[Score]:
    """Scores of answers that have been scored: of each group in the order of first questions, then `overall`.

    With several metrics, for each metric in the order of first questions.
    """
    by_metric = _by([answer.metric for answer in answers])
    scores = []
    for name, indices in by_metric.items():
        own = [answers[index] for index in indices]
        values = [answer.score if answer.parsed else None for answer in own]
        items = [answer.item() for answer in own]
        scores += item_scores(recorded_metric(name), items, values, [answer.group for answer in own], len(by_metric) > 1)
    return scores


def item_scores(
    metric: Metric, items: Sequence[Item], values: Sequence[float | None], groups: Sequence[str], every_group: bool = False
) -> list[Score]:
    """Scores of each group in the order of first items, then `overall`.

    Args:
        values: the score of each item, from `Metric.score_items`.
        groups: the group of each item.
        every_group: whether a single group has a score of its own beside `overall`.
    """
    by_group = _by(groups)
    baseline = _baseline_items(metric, items, list(by_group.values()))
    named = [*by_group.items()] if len(by_group) > 1 or every_group else []
    return [_group_score(name, metric, items, values, baseline, rows) for name, rows in [*named, ("overall", range(len(items)))]]


def _by(keys: Sequence[Key]) -> dict[Key, list[int]]:
    """Indices by key, in the order of first keys."""
    indices: dict[Key, list[int]] = {}
    for index, key in enumerate(keys):
        indices.setdefault(key, []).append(index)
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
            baseline[row] = replace(items[row], prediction=texts[classes.index(most_frequent)], missing_marker=None)
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
        constant_statistics = metric.statistics(constant_items, metric.score_items(constant_items))
        constant = float(metric.headline(constant_statistics.sum(axis=0)))
    return Score(
        task=name,
        metric=metric.name,
        questions=len(group),
        score=float(metric.headline(statistics.sum(axis=0))),
        interval=confidence_interval(metric, statistics, clusters),
        unparsed=scores.count(None),
        missing_markers=tuple(dict.fromkeys(item.missing_marker for item in group if item.missing_marker is not None)),
        clusters=len(set(clusters)),
        baseline=constant,
        further=metric.further(group, scores),
    )


def score_metrics(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    """The metrics of `summary.json` from the answers before and after tuning.

    `metric`, the score, its interval and the baseline stand at the top where all answers have one metric.

    Args:
        before: answers of the base; empty if it was not evaluated.
        after: answers of the tuned model.
    """
    tuned = group_scores(after)
    metrics: dict[str, Any] = {"questions": len(after), "tuned_scores": scores_to_dicts(tuned)}
    metrics["near_ties"] = sum(answer.near_tie for answer in after)
    one_metric = len({score.metric for score in tuned}) == 1
    if one_metric:
        overall = tuned[-1]
        metrics |= {"metric": overall.metric, "tuned_score": overall.score, "tuned_interval": overall.interval}
        metrics |= {} if overall.baseline is None else {"baseline": overall.baseline}
    if before:
        base = group_scores(before)
        metrics["base_scores"] = scores_to_dicts(base)
        metrics |= {"base_score": base[-1].score, "base_interval": base[-1].interval} if one_metric else {}
    return metrics


def scores_to_dicts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores as JSON-serializable dicts, for `summary.json`."""
    return [asdict(item) for item in scores]
