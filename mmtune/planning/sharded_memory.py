"""What a training step takes of each device when several divide it, from the estimate for one that holds everything."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from mmtune.console.styled_console import StyledConsole
from mmtune.distributed.context import REDUCE_BUCKET
from mmtune.planning.memory import MemoryEstimate

LAYOUTS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
BUCKETS = 2 * 4 * REDUCE_BUCKET  # ZeRO's two for gradients on their way, in fp32
GATHERED = 4 * 1_000_000_000  # at ZeRO-3: DeepSpeed keeps up to 1e9 parameters whole, of at most four bytes each


def per_device(estimate: MemoryEstimate, layout: str, processes: int) -> MemoryEstimate:
    """The same step in one of several processes, which have the same batch each.

    DDP copies gradients into buckets. ZeRO-1 divides optimizer states, ZeRO-2 gradients too, ZeRO-3 weights too; each process has
    one more copy of its part of what trains, and buckets. FSDP2 divides what ZeRO-3 divides.

    Args:
        layout: one of `LAYOUTS`.
        processes: how many; one is the estimate itself.
    """
    if processes == 1:
        return estimate
    trained = estimate.trainable
    if layout == "DDP":
        return replace(estimate, gradients=estimate.gradients + trained)

    def part(whole: int) -> int:
        return -(-whole // processes)

    divided = replace(
        estimate, optimizer=part(estimate.optimizer) + part(trained), gradients=estimate.gradients + min(BUCKETS, 2 * trained)
    )
    if layout == "ZeRO-1":
        return divided
    divided = replace(divided, gradients=part(estimate.gradients) + min(BUCKETS, 2 * trained))
    if layout == "ZeRO-2":
        return divided
    held = estimate.weights + estimate.quantization_constants
    return replace(
        divided,
        weights=part(estimate.weights) + min(GATHERED, held + trained),
        quantization_constants=part(estimate.quantization_constants),
        trainable=part(trained),
    )


def layouts_for(estimate: MemoryEstimate, processes: int) -> dict[str, MemoryEstimate]:
    """By layout, fastest first, what each of the processes takes."""
    return {layout: per_device(estimate, layout, processes) for layout in LAYOUTS}


def print_layouts(layouts: dict[str, MemoryEstimate], processes: int, limit_bytes: int | None = None) -> None:
    """A table of what each device takes, and the first layout that fits."""
    table = Table(title=f"Each of {processes} devices, by layout", title_justify="left")
    for column in ("layout", "GB (10^9 bytes)", "with the allowance"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for layout, estimate in layouts.items():
        table.add_row(layout, f"{estimate.peak / 1e9:.2f}", f"{(estimate.peak + estimate.overhead) / 1e9:.2f}")
    StyledConsole().print_table(table)
    if limit_bytes is not None:
        fits = next((layout for layout, estimate in layouts.items() if estimate.fits(limit_bytes)), None)
        print(f"the first that fits {limit_bytes / 1e9:.1f} GB: {fits or 'none; offload, or see the changes below'}")
