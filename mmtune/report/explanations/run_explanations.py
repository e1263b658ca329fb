"""Explanations of a run: some of the sample answers of its report, explained after tuning, and read again for the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.native_regions import with_native_regions
from mmtune.data.message import Sample, prompt_messages, text_message
from mmtune.distributed.context import DistributedContext
from mmtune.evaluation.answers import Answer
from mmtune.evaluation.predictions.questions import questions_of, with_prompt
from mmtune.explain.explanation_methods import explain
from mmtune.recipe.recipe import EvaluateSection, Recipe
from mmtune.report.answer_cards import choose_answers, evenly_spaced
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import RecipeValueError, UserError
from mmtune.utils.files import replace_text


def check_explained(recipe: Recipe, dist: DistributedContext) -> None:
    """Check that a run can explain the answers that its recipe asks for.

    Raises:
        RecipeValueError: the weights are sharded.
    """
    if recipe.evaluate and recipe.evaluate.explain and dist.sharded:
        raise RecipeValueError(
            "evaluate.explain",
            f"expected full weights in each process, got {dist.strategy}; set it to 0, and run `mmtune explain RUN` afterwards",
        )


def write_explanations(
    model: nn.Module,
    processor: ProcessorMixin,
    section: EvaluateSection,
    run: RunDirectory,
    before: Sequence[Answer],
    after: Sequence[Answer],
) -> None:
    """Explain `evaluate.explain` of the answers that the report shows, and write them into the run.

    An answer that cannot be explained, such as an empty one, is named with the reason.

    Args:
        before, after: the answers of the base, if there are any, and of the tuned model.
    """
    chosen = [pair[1] for group in choose_answers(before, after, section.samples).values() for pair in group]
    predictions = {answer.id: answer.prediction for answer in evenly_spaced(chosen, section.explain)}
    explanations = []
    for sample in _questions(section, processor, predictions):
        answered = Sample(
            sample.id, [*prompt_messages(sample), text_message("assistant", predictions[sample.id])], tools=sample.tools
        )
        try:
            explanation = explain(model, processor, answered, batch_size=section.batch_size)
        except UserError as error:
            print(f"not explained: {sample.id}: {error}")
        else:
            explanations.append({"id": sample.id, **explanation.to_dict()})
    print(f"explained: {len(explanations)} of the sample answers in {run.report.name}")
    replace_text(run.explanations, json.dumps({"explanations": explanations}))


def _questions(section: EvaluateSection, processor: ProcessorMixin, wanted: Mapping[str, Any]) -> Iterator[Sample]:
    """The questions with these ids, as evaluation asks them."""
    rows = IndexedSamples(section.sources)
    left = len(wanted)
    for number in range(len(rows)):
        if not left:
            return
        for question in questions_of(with_native_regions(rows[number], processor), section):
            if question.id in wanted:
                left -= 1
                yield with_prompt(question, section.prompt)
