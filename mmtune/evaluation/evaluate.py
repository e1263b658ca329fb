"""Evaluation: answers of a model to the held-out questions, and their scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from mmtune.data.dataset import DataReport, IndexedSamples, check_rows, iterate_rows
from mmtune.data.message import RowError, split_question, text_of
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.evaluation.answering import predict_answers
from mmtune.evaluation.choices import check_choices
from mmtune.evaluation.metrics import exact_match, final_answer, majority_accuracy, wilson_interval
from mmtune.recipe.recipe import EvaluateSection
from mmtune.utils.errors import RecipeValueError


@dataclass(frozen=True)
class Answer:
    """A held-out question with its reference answer and the model's prediction.

    Attributes:
        id: the row id.
        task: the task that the row names, or None.
        images: paths or URIs of the question's images.
        source: the name of the row's source; None if the recipe has one source.
    """

    id: str
    task: str | None
    question: str
    images: tuple[str, ...]
    reference: str
    prediction: str
    correct: bool
    source: str | None = None

    @property
    def group(self) -> str:
        """The group whose score the answer counts in: its task, or its source if the row names no task."""
        return self.task or self.source or "untitled"


@dataclass(frozen=True)
class Score:
    """Exact-match accuracy over a group of answers, with a 95% Wilson interval and the majority-class baseline.

    `task` is the `group` of the answers, or `overall`.
    """

    task: str
    questions: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    majority_accuracy: float


def check_questions(section: EvaluateSection) -> None:
    """Read every held-out row and the headers of its images, without a model.

    Raises:
        UserError: rows that cannot be evaluated, by id. They are not skipped: an accuracy over fewer questions would be another
            metric.
    """
    samples = IndexedSamples(section.data)
    report = DataReport(rows=len(samples))
    check_rows(samples, report, len(samples))
    for handle in samples.subset(len(samples)):
        try:
            split_question(handle())
        except RowError as error:
            report.add(error)
    if section.score == "choices" and not report.quarantined:
        for sample in iterate_rows(samples):
            check_choices(sample)
    if report.quarantined:
        raise RecipeValueError(
            "evaluate", f"{len(report.quarantined)} of {len(samples)} rows cannot be evaluated:\n{report.listing()}"
        )


def evaluate(
    model: nn.Module,
    processor: ProcessorMixin,
    section: EvaluateSection,
    dist: DistributedContext = SINGLE_PROCESS,
    label: str = "evaluating",
) -> list[Answer]:
    """Answer and score every question of the recipe's `evaluate` section.

    Ranks share the questions, and every rank returns all answers. Under ZeRO-3 a forward pass needs all ranks, so every rank
    answers all questions.

    Raises:
        RowError: a held-out row that cannot be read.
    """
    rows = IndexedSamples(section.data)
    samples = list(iterate_rows(rows))
    questions = [split_question(sample) for sample in samples]
    indices = range(len(samples)) if dist.sharded else range(dist.rank, len(samples), dist.size)
    rank_predictions = predict_answers(model, processor, [samples[index] for index in indices], section, label)
    gathered = dist.all_gather_object(list(zip(indices, rank_predictions, strict=True)))
    predictions = dict(itertools.chain.from_iterable(gathered))
    answers = []
    for index, sample in enumerate(samples):
        prediction = predictions[index]
        question, reference = questions[index]
        conclusion = final_answer(prediction, section.answer_after)
        references = (reference, *sample.references)
        correct = any(exact_match(conclusion, final_answer(text, section.answer_after)) for text in references)
        answers.append(
            Answer(
                id=sample.id,
                task=sample.task,
                question=text_of(next(message for message in reversed(question) if message["role"] == "user")),
                images=tuple(str(path) for path in sample.images),
                reference=reference,
                prediction=prediction.strip(),
                correct=correct,
                source=rows.names[rows.source_of(index)] if len(section.data) > 1 else None,
            )
        )
    return answers


def score(answers: Sequence[Answer], section: EvaluateSection) -> list[Score]:
    """Scores per group in the order of first questions, then `overall`; a group is a task, or a source if rows name no task."""
    names = list(dict.fromkeys(answer.group for answer in answers))
    groups = [(name, [answer for answer in answers if answer.group == name]) for name in names]
    if len(groups) == 1:
        groups = []
    return [_score(name, group, section.answer_after) for name, group in [*groups, ("overall", list(answers))]]


def _score(name: str, answers: Sequence[Answer], marker: str | None) -> Score:
    correct = sum(answer.correct for answer in answers)
    majority = majority_accuracy([final_answer(a.reference, marker) for a in answers], [a.group for a in answers])
    return Score(
        task=name,
        questions=len(answers),
        correct=correct,
        accuracy=correct / len(answers) if answers else 0.0,
        interval=wilson_interval(correct, len(answers)),
        majority_accuracy=majority,
    )


def score_metrics(before: Sequence[Answer], after: Sequence[Answer], section: EvaluateSection) -> dict[str, Any]:
    """The metrics of `summary.json` from the answers before and after tuning.

    Args:
        before: answers of the base; empty if it was not evaluated.
        after: answers of the tuned model.
        section: the recipe's `evaluate` section.
    """
    tuned = score(after, section)
    metrics: dict[str, Any] = {
        "questions": tuned[-1].questions,
        "tuned_accuracy": tuned[-1].accuracy,
        "tuned_interval": tuned[-1].interval,
        "majority_accuracy": tuned[-1].majority_accuracy,
        "tuned_scores": scores_to_dicts(tuned),
    }
    if before:
        base = score(before, section)
        metrics |= {"base_accuracy": base[-1].accuracy, "base_interval": base[-1].interval, "base_scores": scores_to_dicts(base)}
    return metrics


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as JSON lines, in the order of the questions."""
    path.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")


def read_answers(path: Path) -> list[Answer]:
    """Read answers that `write_answers` wrote."""
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+0085 and U+2028 inside an answer
        return [Answer(**{**row, "images": tuple(row["images"])}) for row in map(json.loads, lines)]


def scores_to_dicts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores as JSON-serializable dicts, for `summary.json`."""
    return [asdict(item) for item in scores]
