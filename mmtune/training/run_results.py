"""Results of a run: the answers of the base and of the tuned model, and what `summary.json` says of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import ProcessorMixin

from mmtune.distributed.sharded_parameters import gathered_forward
from mmtune.evaluation.answers import Answer
from mmtune.evaluation.answers_file import write_answers
from mmtune.evaluation.comparison import task_metrics, tuning_metrics
from mmtune.evaluation.evaluate import evaluate, evaluate_tasks
from mmtune.models.generation import DEFAULT_MAX_NEW_TOKENS, generation_settings, unused_settings
from mmtune.recipe.recipe import EvaluateSection
from mmtune.run_directory import RunDirectory
from mmtune.training.run_inputs import RunInputs
from mmtune.tuning.apply import TunedModel


def evaluate_base(inputs: RunInputs, model: Any, processor: ProcessorMixin, run: RunDirectory) -> list[Answer]:
    """Answers of the base before tuning, if the recipe asks for them; those of a resumed run are in the cache."""
    section = inputs.recipe.evaluate
    if not (section and section.before):
        return []
    with gathered_forward(model):
        return _answers(inputs, section, model, processor, run, "before", inputs.hash_weights())


def evaluate_tuned(inputs: RunInputs, model: Any, processor: ProcessorMixin, run: RunDirectory) -> list[Answer]:
    """Answers of the tuned model after its export, if the recipe has an evaluation."""
    section = inputs.recipe.evaluate
    return _answers(inputs, section, model, processor, run, "after", inputs.hash_weights(run)) if section else []


def _answers(
    inputs: RunInputs,
    section: EvaluateSection,
    model: Any,
    processor: ProcessorMixin,
    run: RunDirectory,
    when: Literal["before", "after"],
    weights: str | None,
) -> list[Answer]:
    """The answers to the held-out rows, which the main process writes, and those to the tasks.

    Args:
        when: before or after tuning.
        weights: the hash of the weights.
    """
    answers = evaluate(model, processor, section, inputs.dist, f"{when} tuning", weights)
    evaluate_tasks(model, processor, section, run, when, inputs.dist, weights)
    if inputs.dist.is_main_process:
        write_answers(answers, run.answers(when))
    return answers


def result_metrics(
    inputs: RunInputs,
    tuned: TunedModel,
    processor: ProcessorMixin,
    run: RunDirectory,
    before: Sequence[Answer],
    after: Sequence[Answer],
) -> dict[str, Any]:
    """The metrics of `summary.json` on the model, the data, generation and the scores; in the main process."""
    section = inputs.recipe.evaluate
    return {
        "strategy": inputs.dist.strategy,
        "trainable_parameters": sum(count.trainable for count in tuned.counts),
        "total_parameters": sum(count.total for count in tuned.counts),
        **inputs.data_report.metrics(),
        "generation": generation_settings(tuned.model, processor, section.max_new_tokens if section else DEFAULT_MAX_NEW_TOKENS),
        "generation_not_used": unused_settings(tuned.model),
        **(tuning_metrics(before, after) | task_metrics(section, run) if section else {}),
    }
