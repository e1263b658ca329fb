"""Combinations of method, precision, packing and parallelism strategy that a run does not support."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from mmtune.distributed.context import DistributedContext
from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.models.load import ResolvedBase
from mmtune.models.packed_attention import check_packable_family
from mmtune.models.quantize import QUANTIZED
from mmtune.recipe.recipe import Recipe
from mmtune.utils.errors import RecipeValueError


def takes_sharded_weights(recipe: Recipe) -> bool:
    """Whether models may be built sharded at ZeRO-3: weights are not quantized, and no initialization needs the full ones."""
    return recipe.model.precision not in QUANTIZED and not recipe.tune.needs_full_weights


def check_method(
    recipe: Recipe, base: ResolvedBase, arguments: TrainingArguments, dist: DistributedContext, checkpoint: Path | None
) -> None:
    """Check the method and packing against the base's family and the parallelism strategy.

    Raises:
        UserError: a combination that does not work, or that was not compared with one process under FSDP2.
    """
    if recipe.data.max_nonfinite_steps and dist.zero_stage == 0:
        raise RecipeValueError(
            "data.max_nonfinite_steps", "DeepSpeed without ZeRO takes every step, so none can be skipped; leave it out"
        )
    if recipe.data.cache_features is not None and (dist.fsdp or dist.zero_stage == 3):
        strategy = "FSDP2" if dist.fsdp else "ZeRO-3"
        message = f"{strategy} gathers the tower's weights in all processes at once, and only some would run it"
        raise RecipeValueError("data.cache_features", f"{message}; launch with DDP or ZeRO-2, or leave it out")
    if recipe.data.packing and base.config is not None:
        check_packable_family(base.config)
    problem = recipe.tune.incompatibility(recipe.model.precision, model_type=base.model_type, zero_stage=dist.zero_stage)
    if problem is not None:
        component, reason = problem
        raise RecipeValueError(f"tune.{component}", reason)
    if dist.fsdp:
        _check_fsdp(recipe, arguments, checkpoint)


def _check_fsdp(recipe: Recipe, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    if recipe.model.precision in QUANTIZED:
        raise RecipeValueError(
            "model.precision", f"{recipe.model.precision}: FSDP2 does not shard quantized weights; launch with DDP or ZeRO"
        )
    method = recipe.tune.method
    if method is not None and not METHODS[method].supports_fsdp:
        raise RecipeValueError(
            "tune", f"{method} has not been verified under FSDP2; launch with DDP or ZeRO, or use {DEFAULT_METHOD}"
        )
    if arguments.save_strategy != "no" or checkpoint is not None:
        raise RecipeValueError(
            "train.save_strategy",
            "resuming from a checkpoint is not supported under FSDP2; leave it out, or launch with DDP or ZeRO",
        )
