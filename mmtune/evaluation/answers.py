"""Answers: held-out questions with their references and predictions, their scores, and the file that holds them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from mmtune.evaluation.metrics.intervals import confidence_interval
from mmtune.evaluation.metrics.metric import Item, Metric
from mmtune.evaluation.metrics.metric_table import find_metric, recorded_metric
from mmtune.utils.errors import UserError, reason_of

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

    @property
    def group(self) -> str:
        """The group whose score the answer counts in: its task, or its source if the row names no task."""
        return self.task or self.source or "untitled"

    def item(self) -> Item:
        """What the metric scores: the texts after `answer_after`.

        A prediction without it was cut off, and is empty; a reference without it counts as a whole.
        """
        row = {"question": self.question, "choices": self.choices, "options": self.options, "images": self.images, "id": self.id}
        return make_item(self.prediction, self.references, self.answer_after, self.cluster, row)


@dataclass(frozen=True)
class Score:
    """The score of a group of answers by one metric.

    Attributes:
        task: the `group` of the answers, or `overall`.
        metric: its name.
        score: the headline number; unparsed answers count as the metric's `unparsed_score`.
        interval: its 95% confidence interval; None where it has none, see `confidence_interval`.
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
    interval: tuple[float, float] | None
    unparsed: int
    clusters: int
    baseline: float | None
    further: dict[str, Any]


def final_answer(text: str, marker: str | None) -> str | None:
    """The text after the last `marker`, stripped; None if the text lacks it. The whole text if `marker` is None."""
    if not marker:
        return text.strip()
    return text.rpartition(marker)[2].strip() if marker in text else None


def make_item(
    prediction: str, references: Sequence[str], answer_after: str | None, cluster: str, fields: Mapping[str, Any]
) -> Item:
    """What a metric scores; see `Answer.item`."""
    texts = [(reference, final_answer(reference, answer_after)) for reference in references]
    accepted = tuple(whole.strip() if final is None else final for whole, final in texts)
    answer = final_answer(prediction, answer_after)
    return Item(answer or "", accepted, cluster, fields, cut_off=answer is None)


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
            baseline[row] = replace(items[row], prediction=texts[classes.index(most_frequent)], cut_off=False)
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


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as JSON lines, in the order of the questions."""
    path.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")


_LISTS = tuple(each.name for each in fields(Answer) if str(each.type).startswith("tuple"))


def read_answers(path: Path) -> list[Answer]:
    """Read answers that `write_answers` wrote.

    Raises:
        UserError: the file cannot be read, or a line is not such an answer.
    """
    answers = []
    try:
        with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+0085 and U+2028 inside an answer
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    answers.append(Answer(**{**row, **{name: tuple(row[name]) for name in _LISTS if name in row}}))
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(f"{path}:{number}: expected an answer as `mmtune eval` writes it: {error!r}"[:300]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from error
    return answers


MAX_ERRORS = 10
"""How many faulty lines `read_items` lists."""


def read_items(path: Path, metric: Metric, answer_after: str | None = None) -> list[Item]:
    """Read answers that were made elsewhere, one JSON object per line.

    A line has `prediction`, a text, and `references`, a list of texts; optionally `id` and `cluster`, which default to the line's
    number, and further fields. Lines that `write_answers` wrote are read too.

    Raises:
        UserError: the file cannot be read, or has no line; lines that are wrong, or that the metric cannot score, by number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {reason_of(error)}; expected JSON Lines in UTF-8") from error
    items, errors = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _read_line(line, str(number), answer_after)
            if (problem := metric.problem(item)) is not None:
                raise ValueError(f"references: {problem} (metric {metric.name})")
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
        else:
            items.append(item)
    if errors:
        more = [f"... and {len(errors) - MAX_ERRORS} more lines"] if len(errors) > MAX_ERRORS else []
        raise UserError("\n".join([*errors[:MAX_ERRORS], *more]))
    if not items:
        raise UserError(f"{path}: expected one JSON object per line, got an empty file")
    return items


def _read_line(line: str, number: str, answer_after: str | None) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got text that is not JSON: {reason_of(error)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    references = row.get("references")
    if not isinstance(row.get("prediction"), str):
        raise ValueError(f"prediction: expected a text, got {_kind(row, 'prediction')}")
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise ValueError(f"references: expected a list of texts, got {_kind(row, 'references')}")
    for name in ("choices", "options"):
        if not isinstance(row.get(name, []), list) or not all(isinstance(text, str) for text in row.get(name, [])):
            raise ValueError(f"{name}: expected a list of texts, got {_kind(row, name)}")
    fields = {"id": number, **{name: value for name, value in row.items() if name not in ("prediction", "references")}}
    return make_item(row["prediction"], references, answer_after, str(row.get("cluster", number)), fields)


def _kind(row: dict[str, Any], name: str) -> str:
    return json.dumps(row[name], ensure_ascii=False)[:80] if name in row else "no such key"
