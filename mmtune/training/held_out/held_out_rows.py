"""Held-out rows of the evaluation while training: which rows, their lengths, and their batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import ProcessorMixin

from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler
from mmtune.data.dataset import OVER_LENGTH_HINT, IndexedSamples
from mmtune.data.encoding.encode import over_length_error
from mmtune.distributed.context import DistributedContext
from mmtune.planning.token_plan import plan_section
from mmtune.recipe.recipe import DataSection, Recipe
from mmtune.utils.errors import RecipeValueError

KEY = "evaluate"


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of the held-out loss: all of `evaluate`, or a fixed sample of them.

    Attributes:
        samples: all held-out rows.
        section: the recipe's `data`, with the held-out sources: a held-out row is encoded as a training row.
        chosen: the numbers of the rows of the loss, int64, ascending.
        lengths: tokens of each of them, shape (rows,).
    """

    samples: IndexedSamples
    section: DataSection
    chosen: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def batches(self, size: int, dist: DistributedContext) -> list[tuple[int, list[int]]]:
        """The batches of this process: the number of their source and their rows. All processes have the same number of them.

        A batch has rows of one source, so that its loss is that source's. `data.packing` and `data.tokens_per_batch` apply.

        Args:
            size: rows per batch, where the recipe does not limit their tokens.
        """
        sources = np.array([self.samples.source_of(int(row)) for row in self.chosen], dtype=np.int64)
        tokens = self.section.tokens_per_batch or (self.section.max_tokens if self.section.packing else None)
        batches: list[tuple[int, list[int]]] = []
        for source in np.unique(sources).tolist():
            rows, lengths = self.chosen[sources == source], self.lengths[sources == source]
            sampler = MixtureBatchSampler(
                Mixture((len(rows),), (len(rows),)),
                seed=0,
                size=size,
                rank=dist.rank,
                world_size=dist.size,
                lengths=lengths,
                tokens=tokens,
                packed=self.section.packing,
                shuffled=False,
                by_length=tokens is None,
            )
            batches += [(source, rows[batch].tolist()) for batch in sampler]
        return batches


def plan_held_out(recipe: Recipe, processor: ProcessorMixin, dist: DistributedContext) -> HeldOutRows | None:
    """Choose the rows of the evaluation while training and count their tokens; None if the recipe has no such evaluation.

    Raises:
        RecipeValueError: rows that cannot be encoded, that are too long under `data.over_length: error`, or none that is left.
            They are not skipped: a mean over fewer rows would be another metric.
    """
    if recipe.evaluate is None or not recipe.evaluates_while_training:
        return None
    section = recipe.data.model_copy(update={"train": recipe.evaluate.sources, "stream": False})
    samples = IndexedSamples(section.train)
    drawn, total = recipe.evaluate.while_training, len(samples)
    chosen = np.arange(total)
    if drawn.rows is not None and drawn.rows < total:
        chosen = np.sort(np.random.default_rng(drawn.seed).choice(total, drawn.rows, replace=False))
    lengths = _count(samples, section, chosen, processor, dist)
    usable = lengths > 0
    if not usable.any():
        raise RecipeValueError(KEY, f"all {len(chosen)} held-out rows are longer than data.max_tokens: {section.max_tokens}")
    left_out = f", {int((~usable).sum()):,} left out as too long" if not usable.all() else ""
    print(f"held-out loss: {int(usable.sum()):,} of {total:,} rows{left_out}")
    return HeldOutRows(samples, section, chosen[usable], lengths[usable])


def _count(
    samples: IndexedSamples,
    section: DataSection,
    chosen: NDArray[np.int64],
    processor: ProcessorMixin,
    dist: DistributedContext,
) -> NDArray[np.int64]:
    """Tokens of the chosen rows, 0 for one that is too long."""
    plan, outcome = plan_section(samples, section, processor, dist)
    inside = set(chosen.tolist())
    errors = [error for row, error in plan.errors.items() if row in inside]
    if errors:
        raise RecipeValueError(KEY, f"{len(errors)} of {len(chosen)} rows have no held-out loss, the first: {errors[0]}")
    longer = [row for row in outcome.dropped if row in inside]
    if longer and section.over_length == "error":
        first = over_length_error(samples[longer[0]].id, int(plan.tokens[longer[0]]), section.max_tokens or 0)
        raise RecipeValueError(KEY, f"{len(longer)} held-out rows are too long, the first: {first} ({OVER_LENGTH_HINT})")
    return outcome.lengths[chosen]
