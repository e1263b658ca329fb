"""Evaluation: answers of a model to the held-out questions, each scored by its metric."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn
from transformers import ProcessorMixin

from mmtune.data.dataset import DataReport, IndexedSamples, StreamedSamples, check_rows, iterate_rows, open_samples
from mmtune.data.encoding.native_regions import with_native_regions
from mmtune.data.linked_rows import first_linked_keys, row_keys
from mmtune.data.media.image_content import media_key
from mmtune.data.media.media_names import is_utf8
from mmtune.data.message import RowError, Sample, all_text_of, split_question, text_of
from mmtune.data.templates.template import name_in
from mmtune.data.validation.leakage import check_leakage
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.evaluation.answers import Answer, of_benchmark, score_answers
from mmtune.evaluation.answers_file import write_answers
from mmtune.evaluation.field_groups import NO_VALUE
from mmtune.evaluation.metrics.metric_table import find_metric, metric_name
from mmtune.evaluation.predictions.answer_cache import AnswerCache, open_answer_cache
from mmtune.evaluation.predictions.answering import predict_answers
from mmtune.evaluation.predictions.choices import check_choices
from mmtune.evaluation.predictions.decoding import NEAR_TIE
from mmtune.evaluation.predictions.likelihood_choice import content_free_sample
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.evaluation.predictions.questions import questions_of, with_prompt
from mmtune.evaluation.tasks import recipe_tasks
from mmtune.recipe.recipe import EvaluateSection, Recipe
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import RecipeValueError, UserError, errors_at_key


def check_held_out(recipe: Recipe, training: IndexedSamples | StreamedSamples) -> None:
    """Check the held-out rows of a recipe, and that they are not in the training data. Raises as the two checks."""
    if recipe.evaluate:
        check_questions(recipe.evaluate)
        check_leakage(training, recipe.evaluate, recipe.data.check_rows)
        for task in recipe_tasks(recipe.evaluate):
            with task.located_errors():
                check_questions(task.section)
                check_leakage(training, task.section, recipe.data.check_rows)


def warn_of_leakage(run: Recipe, section: EvaluateSection) -> None:
    """Print a warning if rows that a run is evaluated on, or their images, are also in the data that it was trained on.

    Args:
        run: the recipe of the run.
        section: the rows.
    """
    try:
        training = open_samples(run.data)
        check_leakage(training, section.model_copy(update={"leakage": "warn"}), run.data.check_rows)
    except UserError as error:
        print(f"warning: the rows are not compared with those that the run was trained on: {error}")


def check_questions(section: EvaluateSection) -> None:
    """Read every held-out row and the headers of its images, and check that its metric can score it, without a model.

    Raises:
        UserError: an unknown metric, or rows that cannot be evaluated, by id. They are not skipped: a score over fewer questions
            would be another metric.
    """
    samples = IndexedSamples(section.sources)
    with errors_at_key("evaluate.metric"):
        metrics = [find_metric(metric_of(samples, source, section)) for source in range(len(section.sources))]
    report = DataReport(rows=len(samples))
    check_rows(samples, report, len(samples))
    lacking = set(section.groups)
    for index, handle in enumerate(samples.subset(len(samples))):
        try:
            sample = handle()
            _check_unicode(sample)
            for question in unanswered(samples, index, sample, section):
                lacking -= {name for name, value in question.groups.items() if value != NO_VALUE}
                item = question.item()
                if (problem := metrics[samples.source_of(index)].problem(item)) is not None:
                    raise RowError(item.fields["id"], "references", problem)
        except RowError as error:
            report.add(error)
    if section.score == "choices" and not report.quarantined:
        for sample in iterate_rows(samples):
            check_choices(sample)
            if section.choice_scores.calibrate:
                content_free_sample(sample)
    if lacking and not report.quarantined and len(samples):
        fields = ", ".join(samples.row(0)[1])
        raise RecipeValueError("evaluate.groups", f"no held-out row has {', '.join(sorted(lacking))}; the first one has {fields}")
    if report.quarantined:
        raise RecipeValueError(
            "evaluate", f"{len(report.quarantined)} of {len(samples)} rows cannot be evaluated:\n{report.listing()}"
        )


def _check_unicode(sample: Sample) -> None:
    texts = {f"messages[{number}]": all_text_of(message) for number, message in enumerate(sample.messages)}
    texts |= {name: "".join(getattr(sample, name) or "") for name in ("task", "references", "choices", "options")}
    for name, text in texts.items():
        if not is_utf8(text):
            detail = f"expected valid Unicode, got a lone surrogate in {ascii(text)[-80:]}"
            raise RowError(sample.id, name, detail, "text_not_unicode")


def evaluate(
    model: nn.Module,
    processor: ProcessorMixin,
    section: EvaluateSection,
    dist: DistributedContext = SINGLE_PROCESS,
    label: str = "evaluating",
    weights: str | None = None,
    chosen: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer and score every question of the recipe's `evaluate` section.

    Ranks share the questions, and every rank returns all answers. Under ZeRO-3 a forward pass needs all ranks, so every rank
    answers all questions.

    Args:
        dist: the processes of the evaluation.
        label: the label of the progress display.
        weights: the hash of the files that hold the weights, with which answers are cached; None: they are not.
        chosen: the numbers of the rows; None: all.

    Raises:
        RowError: a held-out row that cannot be read.
    """
    rows = IndexedSamples(section.sources)
    numbers = range(len(rows)) if chosen is None else chosen
    read = [with_native_regions(rows[number], processor) for number in numbers]
    questions: list[Answer] = []
    samples: list[Sample] = []
    for number, sample, cluster in zip(
        numbers, read, clusters_of(read, [rows.source_of(number) for number in numbers]), strict=True
    ):
        questions += unanswered(rows, number, sample, section, cluster)
        samples += [with_prompt(question, section.prompt) for question in questions_of(sample, section)]
    indices = range(len(samples)) if dist.sharded else range(dist.rank, len(samples), dist.size)
    cache = open_answer_cache(model, processor, weights, dist) if section.cache else None
    rank_predictions = predict_answers(model, processor, [samples[index] for index in indices], section, label, cache)
    gathered = dist.all_gather_object(list(zip(indices, rank_predictions, strict=True)))
    predictions = dict(itertools.chain.from_iterable(gathered))
    if dist.is_main_process:
        _print_counts(list(predictions.values()), label, cache)
    answers = [_answered(question, predictions[index]) for index, question in enumerate(questions)]
    return score_answers(answers)


def evaluate_tasks(
    model: nn.Module,
    processor: ProcessorMixin,
    section: EvaluateSection,
    run: RunDirectory,
    when: Literal["before", "after"],
    dist: DistributedContext = SINGLE_PROCESS,
    weights: str | None = None,
) -> None:
    """Evaluate the tasks of a recipe, each as by `evaluate`, and write the answers before or after tuning into the run."""
    for task in recipe_tasks(section):
        answers = evaluate(model, processor, task.section, dist, f"{when} tuning, {task.name}", weights)
        if dist.is_main_process:
            write_answers(of_benchmark(answers, task.name), run.answers(f"{when}_{task.name}"))


def _answered(question: Answer, prediction: Prediction) -> Answer:
    return replace(
        question,
        prediction=prediction.text.strip(),
        near_tie=prediction.near_tie,
        sampled=prediction.answers,
        choice_scores=prediction.scores,
    )


def _print_counts(predictions: Sequence[Prediction], label: str, cache: AnswerCache | None) -> None:
    """Print how many predictions rounding could change, and how many were in the cache."""
    if near_ties := sum(prediction.near_tie for prediction in predictions):
        print(
            f"{label}: {near_ties:,} of {len(predictions):,} predictions are near ties: their logits differ by less than "
            f"{NEAR_TIE:g}, so another batch size or number of processes can change them"
        )
    if cache is not None and cache.hits:
        print(f"{label}: {cache.hits:,} answers are from the cache {cache.folder} (evaluate.cache: false computes them again)")


def unanswered(
    rows: IndexedSamples, index: int, sample: Sample, section: EvaluateSection, cluster: str | None = None
) -> list[Answer]:
    """The questions of a held-out row as answers with empty predictions. They are one cluster.

    Args:
        rows: the held-out rows.
        index: of the row in `rows`.
        sample: the row.
        cluster: the name of its cluster; None: the row's id.

    Raises:
        RowError: the conversation does not end with an answer of text.
    """
    source = rows.source_of(index)
    groups = {}
    if section.groups:
        row_id, row = rows.row(index)
        values = {name: name_in(row_id, row, name) for name in section.groups}
        groups = {name: NO_VALUE if value is None else value for name, value in values.items()}
    answers = []
    for question in questions_of(sample, section):
        messages, reference = split_question(question)
        answers.append(
            Answer(
                id=question.id,
                task=question.task,
                question=text_of(next(message for message in reversed(messages) if message["role"] == "user")),
                images=tuple(str(path) for path in question.own_images),
                references=question.references if reference in question.references else (reference, *question.references),
                prediction="",
                cluster=sample.id if cluster is None else cluster,
                metric=metric_of(rows, source, section),
                source=rows.names[source] if len(section.sources) > 1 else None,
                answer_after=section.answer_after,
                choices=question.choices,
                options=question.options,
                groups=groups,
                extent=question.extent or (),
            )
        )
    return answers


def metric_of(rows: IndexedSamples, source: int, section: EvaluateSection) -> str:
    """The name of a source's metric."""
    return metric_name(section.metric, rows.templates[source].metric)


def clusters_of(samples: Sequence[Sample], sources: Sequence[int]) -> list[str]:
    """The name of each row's cluster: what it is about.

    Rows of one cluster share an image of the same content or, in one source, a document, directly or through other rows. The name
    is the document or the path of the images of its first row; that of a row without both is its id.

    Args:
        samples: the rows.
        sources: the number of each row's source.

    Raises:
        RowError: an image cannot be read.
    """
    linked = first_linked_keys([row_keys(sample, str(source)) for sample, source in zip(samples, sources, strict=True)])
    names: dict[bytes, str] = {}
    taken: set[str] = set()
    for key, sample, source in zip(linked, samples, sources, strict=True):
        if key is not None and key not in names:
            name = sample.cluster or " ".join(map(media_key, sample.own_images))
            names[key] = f"{name} (source {source + 1})" if name in taken else name
            taken.add(names[key])
    return [sample.id if key is None else names[key] for key, sample in zip(linked, samples, strict=True)]
