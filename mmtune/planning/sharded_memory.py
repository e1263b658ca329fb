"""Memory per device under DDP and ZeRO, from the estimate of a step on one device."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from mmtune.console.styled_console import StyledConsole
from mmtune.distributed.zero import REDUCE_BUCKET
from mmtune.planning.memory import MemoryEstimate

STRATEGIES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
BUCKETS = 2 * 4 * REDUCE_BUCKET  # ZeRO: two buckets of fp32 gradients that are being reduced
GATHERED = 4 * 1_000_000_000  # ZeRO-3: DeepSpeed keeps up to 1e9 gathered parameters of at most four bytes


def per_device(estimate: MemoryEstimate, strategy: str, processes: int) -> MemoryEstimate:
    """The memory of the same step on each of several devices, with the same batch on each.

    DDP copies gradients into buckets. ZeRO-1 shards optimizer states, ZeRO-2 also gradients, ZeRO-3 also weights; each process
    has one more copy of its shard of the trainable parameters, and buckets. FSDP2 shards the same as ZeRO-3.

    Args:
        strategy: one of `STRATEGIES`.
        processes: the number of devices; for one, the result is the estimate itself.
    """
    if processes == 1:
        return estimate
    trainable = estimate.trainable
    if strategy == "DDP":
        return replace(estimate, gradients=estimate.gradients + trainable)

    def shard(size: int) -> int:
        return -(-size // processes)

    memory = replace(
        estimate,
        optimizer=shard(estimate.optimizer) + shard(trainable),
        gradients=estimate.gradients + min(BUCKETS, 2 * trainable),
    )
    if strategy == "ZeRO-1":
        return memory
    memory = replace(memory, gradients=shard(estimate.gradients) + min(BUCKETS, 2 * trainable))
    if strategy == "ZeRO-2":
        return memory
    frozen = estimate.weights + estimate.quantization_constants
    return replace(
        memory,
        weights=shard(estimate.weights) + min(GATHERED, frozen + trainable),
        quantization_constants=shard(estimate.quantization_constants),
        trainable=shard(trainable),
    )


def memory_by_strategy(estimate: MemoryEstimate, processes: int) -> dict[str, MemoryEstimate]:
    """The memory per device by strategy, the fastest strategy first."""
    return {strategy: per_device(estimate, strategy, processes) for strategy in STRATEGIES}


def print_strategies(strategies: dict[str, MemoryEstimate], processes: int, limit_bytes: int | None = None) -> None:
    """Print a table of the memory per device, and the first strategy that fits."""
    table = Table(title=f"Memory per device by parallelism strategy, {processes} devices", title_justify="left")
    for column in ("strategy", "GB (10^9 bytes)", "with overhead"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for strategy, estimate in strategies.items():
        table.add_row(strategy, f"{estimate.peak / 1e9:.2f}", f"{(estimate.peak + estimate.overhead) / 1e9:.2f}")
    StyledConsole().print_table(table)
    if limit_bytes is not None:
        fits = next((strategy for strategy, estimate in strategies.items() if estimate.fits(limit_bytes)), None)
        print(f"first strategy that fits {limit_bytes / 1e9:.1f} GB: {fits or 'none; use offload, or see the changes below'}")
