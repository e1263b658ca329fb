"""Launch validation: what a launcher announces in the environment, checked before processes connect.

accelerate's launcher writes its options to environment variables. `mmtune.distributed.context` compares them with the processes
and the strategy that result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root

from mmtune.utils.errors import RecipeValueError, UserError

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
DEEPSPEED, DEEPSPEED_CONFIG = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"
FSDP = "ACCELERATE_USE_FSDP"
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables of Slurm's srun and MPI's mpirun with the number of processes that they started."""


def is_launched() -> bool:
    """Whether a launcher has started this process, alone or as one of several."""
    return set(RENDEZVOUS) <= os.environ.keys()


def launched_with_fsdp() -> bool:
    """Whether accelerate's launcher was configured for FSDP."""
    return _is_set(FSDP)


def launched_with_deepspeed() -> bool:
    """Whether accelerate's launcher was configured for DeepSpeed."""
    return _is_set(DEEPSPEED)


def check_launch(precision: str, deepspeed_config: str | Mapping[str, Any] | None = None) -> None:
    """Check the launch environment against the recipe, and add `train.deepspeed` to it as accelerate's launcher would.

    Args:
        precision: the recipe's `model.precision`.
        deepspeed_config: the recipe's `train.deepspeed`: a configuration or its file. A process that no launcher started becomes
            the only process of a distributed run.

    Raises:
        UserError: processes that cannot find each other, a strategy that mmtune does not support, or a precision or a
            DeepSpeed configuration that contradicts the recipe.
    """
    _check_rendezvous()
    _check_fsdp_options()
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "the launcher sets a parallelism config, which mmtune does not support; expected DDP, DeepSpeed ZeRO or FSDP2"
        )
    if MIXED_PRECISION in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # accelerate's launcher sets MASTER_ADDR for one process only if it was configured for several
        raise UserError(
            "accelerate was configured for several processes and started one; on GPUs add --multi_gpu, without GPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    mixed_precision = os.environ.get(MIXED_PRECISION, "no")
    if mixed_precision not in ("no", "bf16" if precision != "fp32" else "no"):
        raise UserError(
            f"the launcher sets mixed precision {mixed_precision}, and the recipe's model.precision is {precision}; launch with "
            "--mixed_precision no, the recipe decides"
        )
    if deepspeed_config is not None:
        _enable_deepspeed(deepspeed_config)
    if launched_with_deepspeed():
        _check_deepspeed()
        os.environ[MIXED_PRECISION] = "no"  # DeepSpeed's own would round trainable parameters; see `init_distributed`


def _check_rendezvous() -> None:
    present = [name for name in RENDEZVOUS[:3] if name in os.environ]
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if present and missing:
        raise UserError(
            f"the environment has {', '.join(present)} and lacks {', '.join(missing)}, so the processes cannot find each other; "
            "start them with accelerate launch or torchrun"
        )
    counts = [name for name in TASK_COUNTS if int(os.environ.get(name, "1")) > 1]
    if counts and not present:
        raise UserError(
            f"{counts[0]} says that {os.environ[counts[0]]} copies of this program were started, which cannot find each other; "
            "start one launcher (accelerate launch or torchrun) on each machine"
        )


def _check_fsdp_options() -> None:
    if not launched_with_fsdp():
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("the launcher sets FSDP version 1, which mmtune does not support; expected fsdp_version: 2")
    for option in ("FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        if _is_set(option):
            raise UserError(
                f"the launcher sets {option.lower()}, which mmtune does not support; expected {option.lower()}: false"
            )


def _check_deepspeed() -> None:
    if _is_set("ACCELERATE_USE_CPU"):
        raise UserError(
            "launched with DeepSpeed and with --cpu (or ACCELERATE_USE_CPU), which switches DeepSpeed off without a message; "
            "leave the latter out, a machine without GPUs is recognized"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UserError("launched with DeepSpeed, which is not installed: pip install 'mmtune[deepspeed]'") from error
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/lock")):
        print(f"DeepSpeed waits for the lock {lock} of a process that compiles; delete it if that process has ended", flush=True)


def _enable_deepspeed(config_or_file: str | Mapping[str, Any]) -> None:
    """Set the environment as accelerate's launcher would for this configuration."""
    config = _read_json(config_or_file) if isinstance(config_or_file, str) else dict(config_or_file)
    if launched_with_fsdp():
        raise RecipeValueError("train.deepspeed", "the launcher is configured for FSDP; leave one of the two out")
    if launched_with_deepspeed():
        file = os.environ.get(DEEPSPEED_CONFIG)
        if file == json.dumps(config):  # as this function has set it
            return
        if file is None or _read_json(file) != config:
            raise RecipeValueError(
                "train.deepspeed", "the launcher is configured for DeepSpeed too, with other settings; leave one of the two out"
            )
        return
    if not is_launched():
        if torch.accelerator.device_count() > 1:
            raise RecipeValueError(
                "train.deepspeed",
                f"one process was started on a machine with {torch.accelerator.device_count()} GPUs; start one for each "
                "(accelerate launch --num_processes N mmtune/train.py RECIPE), or choose one, as with CUDA_VISIBLE_DEVICES=0",
            )
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {DEEPSPEED: "true", DEEPSPEED_CONFIG: json.dumps(config)}


def _read_json(file: str) -> Any:
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a DeepSpeed configuration as a JSON object, got {type(config).__name__}")
    return config


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
