"""The objectives by name: what a training run minimizes, and on what kind of batch."""

from __future__ import annotations

from mmtune.models.load import ResolvedBase
from mmtune.objectives.distillation import Distillation
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.recipe import Recipe

OBJECTIVES: dict[str, type[SupervisedTuning]] = {
    "sft": SupervisedTuning,
    "distillation": Distillation,
}
"""By `objective.type` in a recipe. `SupervisedTuning` documents what an entry defines."""


def build_objective(recipe: Recipe, base: ResolvedBase) -> SupervisedTuning:
    """The recipe's objective, checked against the base. No weight is loaded.

    Raises:
        UserError: the objective does not fit the base, where that shows without weights.
    """
    objective = OBJECTIVES[recipe.objective.type](recipe.objective)
    objective.check(recipe, base)
    return objective
