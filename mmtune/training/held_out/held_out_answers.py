"""Scores of generated answers to held-out questions, while the model trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import ProcessorMixin

from mmtune.distributed.context import DistributedContext
from mmtune.evaluation.answers import Answer, group_scores
from mmtune.evaluation.evaluate import evaluate
from mmtune.recipe.recipe import EvaluateSection
from mmtune.training.held_out.held_out_rows import HeldOutRows


def held_out_scores(
    model: nn.Module,
    processor: ProcessorMixin,
    section: EvaluateSection,
    rows: HeldOutRows,
    dist: DistributedContext,
    on_answers: Callable[[Sequence[Answer]], None],
) -> dict[str, float]:
    """`eval_METRIC` for each metric of the held-out rows: its headline number over the rows of the held-out loss.

    All processes call it and get the same values.

    Args:
        on_answers: gets the answers.
    """
    answers = evaluate(model, processor, section, dist, "held-out answers", chosen=rows.chosen.tolist())
    on_answers(answers)
    scores = group_scores(answers)
    return {f"eval_{score.metric}": score.score for score in scores if score.task == "overall"}
