"""The processes that train together: what they were asked to be, what each does alone, and what all do at once.

accelerate's launcher says in the environment what it was asked for; `join_world` holds that against what came to be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import distributed
from transformers import TrainingArguments

from mmtune.errors import UserError

LAUNCHED_WITH = "ACCELERATE_MIXED_PRECISION"
LOST_PEER = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
"""How gloo and NCCL say that another process is gone; they have no class for it."""


@dataclass(frozen=True)
class World:
    """
    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are.
        zero_stage: DeepSpeed's, 0 to 3; None without DeepSpeed.
        construction: transformers looks at it, while it lives, to make models in parts.
    """

    rank: int = 0
    size: int = 1
    zero_stage: int | None = None
    construction: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def layout(self) -> str:
        """Such as `2 processes, ZeRO-3`, for people."""
        if self.size == 1 and self.zero_stage is None:
            return "one process"
        strategy = "DDP" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        return f"{self.size} process{'es' if self.size > 1 else ''}, {strategy}"

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            here = [torch.accelerator.current_device_index()] if distributed.get_backend() == "nccl" else None
            distributed.barrier(device_ids=here)

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """Inside, the launcher's SIGTERM, which it sends when another process has failed, raises SystemExit."""
        if self.size == 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def any(self, mine: bool, device: torch.device) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return mine
        flag = torch.tensor(int(mine), device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def gather(self, mine: Any) -> list[Any]:
        """What every process brings, in the order of their ranks, in every process."""
        if self.size == 1:
            return [mine]
        brought: list[Any] = [None] * self.size
        distributed.all_gather_object(brought, mine)
        return brought


ALONE = World()


def check_launch(precision: str) -> None:
    """
    Args:
        precision: the recipe's `model.precision`.

    Raises:
        UserError: a strategy that mmtune does not train with, or a precision that is not the recipe's.
    """
    if _asked("ACCELERATE_USE_FSDP"):
        raise UserError("launched with FSDP, which mmtune does not train with; DeepSpeed ZeRO shards the same (--use_deepspeed)")
    if _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError("launched with a parallelism config, which mmtune does not train with; DDP or DeepSpeed ZeRO is right")
    if LAUNCHED_WITH in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # accelerate's launcher of one process names a master when it was asked for more
        raise UserError(
            "accelerate was asked for several processes and started one; on GPUs add --multi_gpu, without them launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    asked = os.environ.get(LAUNCHED_WITH, "no")
    if asked not in ("no", "bf16" if precision != "fp32" else "no"):
        raise UserError(
            f"launched with mixed precision {asked}, and the recipe's model.precision is {precision}; the recipe decides: launch "
            "with --mixed_precision no"
        )
    if launched_with_deepspeed():
        if _asked("ACCELERATE_USE_CPU"):
            raise UserError(
                "launched with DeepSpeed and with --cpu (or ACCELERATE_USE_CPU), which switches it off without a word; leave the "
                "latter out, a machine without GPUs is recognized"
            )
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise UserError("launched with DeepSpeed, which is not installed: pip install 'mmtune[deepspeed]'") from error
        os.environ[LAUNCHED_WITH] = "no"  # DeepSpeed's own mixed precision would round what trains; see `join_world`


def join_world(arguments: TrainingArguments, precision: str, in_parts: bool = False) -> World:
    """The processes that `TrainingArguments` has brought together, checked.

    Under DeepSpeed, precision is what it is in one process: weights as stored, trained ones in fp32, and torch's autocast.

    Args:
        precision: the recipe's `model.precision`.
        in_parts: at ZeRO-3 models are made in parts, a part in each process; otherwise whole, and divided when training begins.

    Raises:
        UserError: fewer processes than the launcher announced, or a DeepSpeed configuration that contradicts the recipe.
    """
    plugin = arguments.deepspeed_plugin
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != announced:
        raise UserError(f"{announced} processes were announced and {arguments.world_size} came together; look at the launcher")
    world = World(arguments.process_index, arguments.world_size)
    world.wait()  # until every process has looked at what is there, and before the first makes anything
    if plugin is None:
        return world
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if arguments.use_cpu and torch.accelerator.is_available():
        raise UserError("train.use_cpu: DeepSpeed takes the accelerator that is there; leave one of the two out")
    config = plugin.hf_ds_config.config  # what the Trainer fills in and hands on
    for kind in ("fp16", "bf16", "torch_autocast"):
        if config.get(kind, {}).get("enabled") is True:
            raise UserError(f"the DeepSpeed configuration enables {kind}; leave it out, the recipe's model.precision decides")
        config.pop(kind, None)
    each = arguments.per_device_train_batch_size
    decided = {
        "gradient_clipping": ("max_grad_norm", arguments.max_grad_norm),
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", each),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", arguments.gradient_accumulation_steps),
        "train_batch_size": ("batch", each * arguments.gradient_accumulation_steps * arguments.world_size),
    }
    for key, (name, value) in decided.items():
        given = config.get(key, "auto")
        # accelerate writes an accumulation of 1 where none is given
        if given not in ("auto", value) and (key, given) != ("gradient_accumulation_steps", 1):
            raise UserError(
                f"the DeepSpeed configuration's {key} is {given}, and the recipe's {name} is {value}; leave the former out"
            )
        config[key] = value
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"the DeepSpeed configuration has a section `{section}`; leave it out, the recipe's train decides")
    config["torch_autocast"] = {
        "enabled": precision != "fp32",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients are summed in their own precision
    }
    unset_hf_deepspeed_config()  # until the Trainer sets it again
    zero = config.get("zero_optimization", {})
    stage, construction = int(zero.get("stage", 0)), None
    if stage == 3 and in_parts:
        # DeepSpeed makes every weight of the one dtype that its configuration names, here the one that transformers loads.
        dtype = {"bf16": {"enabled": precision == "bf16"}}
        construction = HfDeepSpeedConfig({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, **dtype})
    return World(arguments.process_index, arguments.world_size, stage, construction)


def check_strategy(accelerator: Accelerator, world: World) -> None:
    """
    Raises:
        UserError: the Trainer's accelerator has made something else of what was asked for.
    """
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    stage = None if plugin is None else plugin.zero_stage
    alone = accelerator.distributed_type == DistributedType.NO
    plain = accelerator.distributed_type != DistributedType.FSDP and alone == (world.size == 1)
    if (accelerator.num_processes, stage) != (world.size, world.zero_stage) or not (plugin or plain):
        raise UserError(
            f"asked for {world.layout}, and accelerate made it {accelerator.distributed_type.value} of "
            f"{accelerator.num_processes}; look at the launcher's configuration"
        )


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error only says that another process has ended."""
    return any(words in str(error) for words in LOST_PEER)


def launched_with_deepspeed() -> bool:
    """Whether accelerate's launcher was asked for DeepSpeed."""
    return _asked("ACCELERATE_USE_DEEPSPEED")


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
