"""Size of the feature cache on disk, predicted before any weight is loaded."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from mmtune.data.batching.collate import Collator
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.feature_store import probe_samples
from mmtune.data.encoding.token_counts import image_sizes
from mmtune.families.family_table import family_of_processor
from mmtune.models.fake_tensors import MemoryTracker, suppress_fake_tensor_warnings
from mmtune.models.meta_model import build_meta
from mmtune.models.towers.vision_towers import VisionTowers
from mmtune.objectives.objective_table import OBJECTIVES
from mmtune.objectives.sft import pad_token_id
from mmtune.planning.memory_sizes import format_memory
from mmtune.planning.token_plan import IntArray
from mmtune.recipe.recipe import Recipe
from mmtune.utils.errors import errors_at_key

SAMPLED = 32
"""Rows whose features are measured; the others count as their mean."""


def plan_features(recipe: Recipe, samples: IndexedSamples, lengths: IntArray, processor: ProcessorMixin) -> dict[str, int] | None:
    """The bytes of the features of a recipe's rows, if no two rows have the same images; None without a feature cache.

    Args:
        lengths: tokens of every row, 0 for a row that does not train.

    Returns:
        `bytes`, and `rows`, the number of rows with images. Both are estimated from `SAMPLED` rows.

    Raises:
        UserError: the model does not compute features of images alone.
    """
    if recipe.data.cache_features is None:
        return None
    trained = (lengths > 0).nonzero()[0]
    chosen = trained[:: max(1, len(trained) // SAMPLED)]
    sizes = [image_sizes(samples[row].messages) for row in chosen.tolist()]
    with_images = [size for size in sizes if size]
    with suppress_fake_tensor_warnings(), errors_at_key("data.cache_features"):
        model = build_meta(recipe.model)
        memory = MemoryTracker(0)
        memory.track_model(model)
        objective = OBJECTIVES[recipe.objective.type](recipe.objective)

        def fake(tensors: dict[str, Any]) -> dict[str, Any]:
            return {name: memory.fake(t) if t.is_floating_point() else t for name, t in tensors.items()}

        batch = Collator(pad_token_id(processor))(probe_samples(processor))
        inputs = fake({name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})
        with memory:
            towers = VisionTowers(model)
            towers.find_outputs(lambda: objective.compute_loss(model, objective.model_inputs(model, inputs), 1).logits)
            total = 0
            for row in with_images:
                media = family_of_processor(processor).process_images(processor, [Image.new("RGB", size) for size in row])[0]
                total += sum(tensor.nbytes for tensor in towers.features(fake(media)))
    share = len(trained) / max(len(chosen), 1)
    return {"bytes": round(total * share), "rows": round(len(with_images) * share)}


def describe_features(plan: dict[str, int], folder: str) -> str:
    """The predicted size as one line."""
    return f"feature cache: at most about {format_memory(plan['bytes'])} in {folder}, for the images of {plan['rows']:,} rows"
