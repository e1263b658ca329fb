"""DeepSpeed ZeRO: its configuration, completed from the recipe."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from mmtune.distributed.deepspeed_private import disable_sharded_construction, enable_sharded_construction
from mmtune.utils.errors import RecipeValueError, UserError

REDUCE_BUCKET = 50_000_000
"""Numbers that ZeRO reduces at a time, if the configuration does not say; DeepSpeed's default takes 2 or 4 GB."""


def configure_zero(config: dict[str, Any], arguments: TrainingArguments, precision: str, is_sharded: bool) -> tuple[int, Any]:
    """Complete the DeepSpeed configuration that the Trainer will use.

    Precision is as in one process: weights as stored, trained ones in fp32, and torch's autocast.

    Args:
        config: the configuration, which is changed in place.
        precision: the recipe's `model.precision`.
        is_sharded: at ZeRO-3 have transformers build models sharded.

    Returns:
        The ZeRO stage, and an object that must stay alive while models are built sharded, or None.

    Raises:
        UserError: the configuration contradicts the recipe.
    """
    if arguments.use_cpu and torch.accelerator.is_available():
        raise RecipeValueError("train.use_cpu", "DeepSpeed uses the accelerator of this machine; leave one of the two out")
    for section in ("fp16", "bf16", "torch_autocast"):
        if config.get(section, {}).get("enabled") is True:
            raise UserError(f"the DeepSpeed configuration enables {section}; leave it out, the recipe's model.precision decides")
        config.pop(section, None)
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"the DeepSpeed configuration has a section `{section}`; leave it out, the recipe's train decides")
    _take_batch_settings(config, arguments)
    config["zero_force_ds_cpu_optimizer"] = False  # with offload too, the optimizer is the recipe's
    config["torch_autocast"] = {
        "enabled": precision != "fp32",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients are summed in their own precision
    }
    disable_sharded_construction()  # until the Trainer enables it
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)
    stage = int(zero.get("stage", 0))
    if stage != 3 or not is_sharded:
        return stage, None
    # DeepSpeed builds every weight in the one dtype of its configuration; this is the dtype that transformers loads.
    dtype = {"bf16": {"enabled": precision == "bf16"}}
    return stage, enable_sharded_construction({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, **dtype})


def _take_batch_settings(config: dict[str, Any], arguments: TrainingArguments) -> None:
    """Write the recipe's batch settings into the configuration, which may only repeat them."""
    per_device = arguments.per_device_train_batch_size
    decided = {
        "gradient_clipping": ("max_grad_norm", arguments.max_grad_norm),
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", per_device),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", arguments.gradient_accumulation_steps),
        "train_batch_size": ("batch", per_device * arguments.gradient_accumulation_steps * arguments.world_size),
    }
    for key, (name, value) in decided.items():
        configured = config.get(key, "auto")
        # accelerate writes an accumulation of 1 if the file has none
        if configured not in ("auto", value) and (key, configured) != ("gradient_accumulation_steps", 1):
            raise UserError(
                f"the DeepSpeed configuration's {key} is {configured}, and the recipe's {name} is {value}; leave the former out"
            )
        config[key] = value
