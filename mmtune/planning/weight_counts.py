"""Weights of a model: stored, and used by one token of a mixture of experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mmtune.models.experts.expert_stacks import ExpertStack, find_experts
from mmtune.models.meta_model import build_meta
from mmtune.models.quantize import describe_unquantized_experts
from mmtune.recipe.recipe import ModelSection


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights.

    Attributes:
        stored: all of the model; tied weights count once.
        active: without the experts that one token does not use; None where a router does not say how many it uses. A token that
            has experts of its own kind (Ernie 4.5 VL's for text and for images) counts with those of both kinds.
        stacks: the model's stacked experts.
    """

    stored: int
    active: int | None
    stacks: tuple[ExpertStack, ...]


def count_weights(section: ModelSection) -> WeightCounts:
    """The weights of a recipe's model, from configs alone.

    Raises:
        UserError: a config that is neither on this machine nor on the hub.
    """
    model = build_meta(section)
    stacks = tuple(find_experts(model).values())
    stored = sum(parameter.numel() for parameter in model.parameters())
    idle = [None if stack.used is None else (stack.experts - stack.used) * stack.size for stack in stacks]
    known = [size for size in idle if size is not None]
    return WeightCounts(stored, stored - sum(known) if len(known) == len(idle) else None, stacks)


def describe_weights(counts: WeightCounts, precision: str) -> Iterator[str]:
    """Lines about a mixture of experts; none about another model.

    Args:
        precision: `model.precision`.
    """
    if not counts.stacks:
        return
    layers = Counter((stack.used, stack.experts) for stack in counts.stacks)
    routes = ", ".join(
        f"{'an unknown number' if used is None else used} of {experts} experts in {count} layer{'s' if count > 1 else ''}"
        for (used, experts), count in layers.items()
    )
    active = "an unknown number" if counts.active is None else f"{counts.active:,}"
    yield f"weights: {counts.stored:,} stored, {active} used by one token: {routes}"
    if (line := describe_unquantized_experts(counts.stacks, precision)) is not None:
        yield line
