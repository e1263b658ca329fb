"""Distributed context: rank and world size, collectives, and checks that the announced processes and strategy exist."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from torch import distributed
from transformers import TrainingArguments

from mmtune.distributed.launch import is_launched, launched_with_deepspeed, launched_with_fsdp
from mmtune.distributed.zero import configure_zero
from mmtune.utils.errors import UserError

LOST_PEER = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
"""Parts of the messages of gloo and NCCL when another process has ended; they have no exception class for it."""


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, and this one's place among them.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3; None without DeepSpeed.
        fsdp: whether FSDP2 shards the weights.
        construction: transformers builds models sharded at ZeRO-3 while this object is alive.
    """

    rank: int = 0
    size: int = 1
    zero_stage: int | None = None
    fsdp: bool = False
    construction: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights, so that a forward pass needs all processes."""
        return self.zero_stage == 3 or self.fsdp

    @property
    def strategy(self) -> str:
        """The parallelism strategy in words, such as `2 processes, ZeRO-3`."""
        if self.size == 1 and self.zero_stage is None and not self.fsdp:
            return "one process"
        strategy = "FSDP2" if self.fsdp else "DDP" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        return f"{self.size} process{'es' if self.size > 1 else ''}, {strategy}"

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            devices = [torch.accelerator.current_device_index()] if distributed.get_backend() == "nccl" else None
            distributed.barrier(device_ids=devices)

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """Inside, SIGTERM raises SystemExit, so that files are removed; launchers send it when another process has failed."""
        previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def any_rank(self, value: bool, device: torch.device) -> bool:
        """Whether the value is true in any process."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value), device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


SINGLE_PROCESS = DistributedContext()


def init_distributed(arguments: TrainingArguments, precision: str, is_sharded: bool = False) -> DistributedContext:
    """The context of the processes that `TrainingArguments` has connected, after checks.

    Args:
        precision: the recipe's `model.precision`.
        is_sharded: at ZeRO-3 build models sharded; otherwise they are built in full and sharded when training begins.

    Raises:
        UserError: fewer processes than the launcher announced, another backend than expected, or a DeepSpeed configuration that
            contradicts the recipe.
    """
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != announced:
        raise UserError(f"expected {announced} processes (WORLD_SIZE), got {arguments.world_size}; check the launcher")
    dist = DistributedContext(arguments.process_index, arguments.world_size)
    _check_backend(arguments)
    dist.barrier()  # every process has read the files that exist before the main one writes any
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        return DistributedContext(dist.rank, dist.size, fsdp=launched_with_fsdp())
    stage, construction = configure_zero(plugin.hf_ds_config.config, arguments, precision, is_sharded)
    return DistributedContext(dist.rank, dist.size, stage, construction=construction)


def check_same(dist: DistributedContext, values: Mapping[str, Any]) -> None:
    """Compare values over the processes.

    Args:
        values: by name, what every process must have alike.

    Raises:
        UserError: a process has another value; its rank is named.
    """
    main, *others = dist.all_gather_object(dict(values))
    for rank, theirs in enumerate(others, start=1):
        for name in sorted({*main, *theirs}):
            if main.get(name) != theirs.get(name):
                raise UserError(
                    f"process {rank} has {name}: {theirs.get(name)!r}, and process 0 {main.get(name)!r}; start all "
                    "with the same recipe, overrides, data and installation"
                )


def _check_backend(arguments: TrainingArguments) -> None:
    if arguments.world_size == 1:
        return
    device = arguments.device.type
    backends = dict(part.split(":") for part in distributed.get_backend_config().split(","))
    expected = arguments.ddp_backend or ("nccl" if device == "cuda" else None)
    if expected is not None and backends.get(device) != expected:
        raise UserError(f"expected the {expected} backend on {device}, got {backends.get(device)}; check the launcher")


def check_strategy(accelerator: Accelerator, dist: DistributedContext, precision: str) -> None:
    """Compare the strategy that the Trainer's accelerator has set up with the one that the launcher announced.

    Args:
        precision: the recipe's `model.precision`.

    Raises:
        UserError: another strategy, number of processes or mixed precision.
    """
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    stage = None if plugin is None else plugin.zero_stage
    is_single = accelerator.distributed_type == DistributedType.NO
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    if DistributedContext(dist.rank, accelerator.num_processes, stage, fsdp) != dist or (is_single and dist.size > 1):
        raise UserError(
            f"expected {dist.strategy}, got {accelerator.distributed_type.value} with {accelerator.num_processes} from "
            f"accelerate; {'FSDP needs GPUs' if dist.fsdp else 'check the launcher configuration'}"
        )
    expected = "no" if precision == "fp32" or plugin else "bf16"
    if accelerator.mixed_precision != expected:
        raise UserError(
            f"model.precision is {precision}: expected mixed precision {expected}, got {accelerator.mixed_precision} from "
            "accelerate; check the launcher configuration"
        )


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error only says that another process has ended."""
    return any(words in str(error) for words in LOST_PEER)


def init_inference() -> DistributedContext:
    """The processes of a launcher that share rows, each with the whole model on its device; one process without a launcher.

    Raises:
        UserError: a launcher for sharded weights.
    """
    if not is_launched():
        return SINGLE_PROCESS
    if launched_with_deepspeed() or launched_with_fsdp():
        raise UserError("launched with DeepSpeed or FSDP, which shard training; use torchrun, or accelerate launch --multi_gpu")
    state = PartialState(cpu=not torch.accelerator.is_available())
    return DistributedContext(state.process_index, state.num_processes)
