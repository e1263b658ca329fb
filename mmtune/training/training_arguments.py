"""transformers' TrainingArguments from a recipe's `train` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mmtune.distributed.launch import is_launched, launched_with_deepspeed
from mmtune.evaluation.metrics.metric_table import find_metric, is_held_out_loss
from mmtune.recipe.pass_through.arguments import EARLY_STOPPING
from mmtune.recipe.recipe import Recipe
from mmtune.recipe.train_rules import LIGER_LOSSES, LOGGING_STEPS
from mmtune.run_directory import RunDirectory
from mmtune.training.trackers.report_to import tracker_names
from mmtune.utils.errors import RecipeValueError, UserError


def build_training_arguments(recipe: Recipe) -> TrainingArguments:
    """transformers' own arguments from the recipe's `train` section, with what mmtune decides.

    Raises:
        UserError: values that TrainingArguments rejects in combination, or that the device does not support.
    """
    settings: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": LOGGING_STEPS,
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "ddp_find_unused_parameters": True,  # a tower's last layers may be trained and unused, checkpointing or not
    }
    settings |= recipe.train
    settings.pop("deepspeed", None)  # `check_launch` has passed it to accelerate
    if settings.get("use_liger_kernel"):
        settings["liger_kernel_config"] = {**dict.fromkeys(LIGER_LOSSES, False), **(settings.get("liger_kernel_config") or {})}
    if recipe.evaluates_while_training:
        best = settings["metric_for_best_model"] = recipe.best_metric
        if settings.get("greater_is_better") is None:  # transformers knows neither `loss_SOURCE` nor error rates
            settings["greater_is_better"] = not is_held_out_loss(best) and find_metric(best).greater_is_better
    if not is_launched():  # TrainingArguments would look for the process group that a launcher sets up
        settings.pop("ddp_backend", None)
    try:
        arguments = TrainingArguments(
            **{name: value for name, value in settings.items() if name not in EARLY_STOPPING},
            output_dir=str(RunDirectory(Path(recipe.output_dir)).checkpoints),
            # DeepSpeed's own would round the trainable parameters: `init_distributed` selects torch's autocast there
            bf16=recipe.model.precision != "fp32" and not launched_with_deepspeed(),
            remove_unused_columns=False,
            label_names=["labels"],
            logging_nan_inf_filter=False,
        )
    except (ValueError, TypeError) as error:
        raise RecipeValueError("train", str(error)) from error
    arguments.report_to = tracker_names(settings["report_to"])
    if arguments.torch_compile and recipe.data.packing and recipe.model.attn_implementation in (None, "sdpa"):
        print("train.torch_compile: packed rows have a dense mask with sdpa; flex_attention and flash attention need none")
    if arguments.use_liger_kernel and arguments.device.type == "cpu":
        raise RecipeValueError(
            "train.use_liger_kernel", "Liger's kernels need a GPU, and this run trains on the CPU; leave it out"
        )
    if arguments.n_gpu > 1:  # the Trainer would wrap the model in DataParallel, which gathers losses that are already divided
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs: give each its own (accelerate launch --multi_gpu --num_processes "
            f"{arguments.n_gpu} mmtune/train.py RECIPE), or choose one, as with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def without_trackers(recipe: Recipe) -> Recipe:
    """The same recipe with `report_to: none`."""
    return recipe.model_copy(update={"train": {**recipe.train, "report_to": "none"}})
