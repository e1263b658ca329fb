"""The plan of a recipe's data as figures, and as a page in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from transformers import ProcessorMixin

from mmtune.console.styled_console import StyledConsole
from mmtune.data.batching.bin_packing import pack_lengths, packing_efficiency
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.encoding.token_counts import image_replacements, image_sizes
from mmtune.data.message import Sample
from mmtune.planning.token_plan import IntArray, OverLengthOutcome, Plan, plan_section
from mmtune.recipe.recipe import DataSection

BARS, WIDTH = 12, 40
SHOWN = 10


Lengths = tuple[IndexedSamples, IntArray]
"""The rows, and the tokens of each as it would train."""


def plan_data(section: DataSection, processor: ProcessorMixin) -> tuple[dict[str, Any], dict[str, Any], Lengths]:
    """Plan a recipe's training data.

    Args:
        section: the recipe's `data`.
        processor: the model's, its chat template settled.

    Returns:
        The plan's figures, as JSON has them, and what the memory estimate takes of the longest row that would train: `tokens`,
        `images`, `image_size` (height, width), and the largest number of `supervised` tokens; empty where no row would train;
        and what batches are made of.

    Raises:
        UserError: data that cannot be read, or a processor whose tokens cannot be counted.
    """
    samples = IndexedSamples(section.train)
    plan, outcome = plan_section(samples, section, processor)
    figures = plan_statistics(plan, outcome, section)
    lengths = samples, outcome.lengths
    if not figures["rows_trained"]:
        return figures, {}, lengths
    row = int(outcome.lengths.argmax())
    fitted = fit_to_budget(samples[row], processor, section.max_tokens, section.over_length, section.supervise)
    longest: dict[str, Any] = {"tokens": fitted.counts.tokens, "images": fitted.counts.images}
    longest["supervised"] = int(plan.supervised[outcome.lengths > 0].max())
    if fitted.counts.images:
        width, height = _typical_size(fitted.sample, processor)
        longest["image_size"] = (height, width)
    return figures, longest, lengths


def _typical_size(sample: Sample, processor: ProcessorMixin) -> tuple[int, int]:
    """The largest of a sample's images of which as many as it has take no more tokens than its own."""
    sizes = image_sizes(sample.messages)

    def characters(images: Sequence[tuple[int, int]]) -> int:
        return sum(map(len, image_replacements(processor, list(images))))

    whole = characters(sizes)
    by_area = sorted(sizes, key=lambda size: size[0] * size[1], reverse=True)
    return next((size for size in by_area if characters([size] * len(sizes)) <= whole), by_area[-1])


def plan_statistics(plan: Plan, outcome: OverLengthOutcome, section: DataSection) -> dict[str, Any]:
    """A plan in figures.

    Args:
        plan: the counts.
        outcome: of the over-length policy.
        section: the recipe's `data`. With `packing`, packs hold its `tokens_per_batch`, or `max_tokens`, or else as much as the
            longest row; `packing` is null without it.

    Returns:
        Plain values, for JSON.
    """
    trained = outcome.lengths[outcome.lengths > 0]
    good = plan.tokens[plan.tokens > 0]
    return {
        "rows": len(plan),
        "rows_faulty": len(plan.faults),
        "rows_trained": len(trained),
        "tokens": int(plan.tokens.sum()),
        "image_tokens": int(plan.media_tokens.sum()),
        "supervised_tokens": int(plan.supervised.sum()),
        "images": int(plan.images.sum()),
        "longest": int(good.max(initial=0)),
        "median": int(np.median(good)) if len(good) else 0,
        "histogram": [{"from": first, "to": last, "rows": rows} for first, last, rows in histogram(good)],
        "max_tokens": section.max_tokens,
        "over_length": {
            "policy": section.over_length,
            "rows": outcome.over_length,
            "rows_dropped": len(outcome.dropped),
            "rows_with_fewer_images": outcome.fewer_images,
            "images_dropped": outcome.images_dropped,
            "rows_with_smaller_images": outcome.smaller_images,
            "images_resized": outcome.images_resized,
        },
        "packing": _packing(trained, section) if section.packing else None,
        "faults": [{"row": e.row, "field": e.field, "detail": e.detail} for _, e in sorted(plan.faults.items())],
        "counted": plan.counted,
        "kept": None if plan.kept is None else str(plan.kept),
    }


def _packing(trained: IntArray, section: DataSection) -> dict[str, Any]:
    capacity = section.tokens_per_batch or section.max_tokens or int(trained.max(initial=1))
    packs = pack_lengths(trained, capacity)
    return {
        "capacity": capacity,
        "packs": len(packs),
        "efficiency": round(packing_efficiency(trained, packs, capacity), 4),
    }


def histogram(lengths: IntArray, bars: int = BARS) -> list[tuple[int, int, int]]:
    """Equal ranges of length with how many rows lie in each: (first, last, rows), at most `bars` of them.

    The ranges are as wide as the next of 1, 2, 5, 10, 20, 50, ...
    """
    if not len(lengths):
        return []
    most = int(lengths.max())
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * bars > most)
    counted = Counter((lengths // width).tolist())
    return [(bar * width, (bar + 1) * width - 1, counted[bar]) for bar in range(int(lengths.min()) // width, most // width + 1)]


def print_data_plan(figures: dict[str, Any]) -> None:
    """A page in the terminal.

    Args:
        figures: from `plan_data`, with the optimizer steps under `steps` and `MixtureBatchSampler.largest` under `largest_batch`.
    """
    console = StyledConsole()
    tokens = max(1, figures["tokens"])
    table = Table(title="Data", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_column("note")
    table.add_row("rows", f"{figures['rows']:,}", f"{figures['rows_faulty']:,} faulty" if figures["rows_faulty"] else "")
    table.add_row("tokens", f"{figures['tokens']:,}", f"longest row {figures['longest']:,}, median {figures['median']:,}")
    share = f"{figures['image_tokens'] / tokens:.0%}, of {figures['images']:,} images"
    table.add_row("image tokens", f"{figures['image_tokens']:,}", share)
    table.add_row("supervised tokens", f"{figures['supervised_tokens']:,}", f"{figures['supervised_tokens'] / tokens:.0%}")
    if packing := figures["packing"]:
        full = f"of {packing['capacity']:,} tokens, {packing['efficiency']:.1%} full"
        table.add_row("packs", f"{packing['packs']:,}", full)
    table.add_row("optimizer steps", f"{figures['steps']:,}", "in one process")
    batch = figures["largest_batch"]
    how = "tokens" if batch["tokens"] == batch["padded_tokens"] else f"tokens with padding, {batch['tokens']:,} without,"
    table.add_row("largest batch", f"{batch['padded_tokens']:,}", f"{how} of {batch['rows']} rows")
    console.print_table(table)
    bars = Table(title="Length of a row in tokens", title_justify="left", show_header=False)
    for number in range(3):
        bars.add_column(justify="left" if number == 1 else "right")
    most = max((bar["rows"] for bar in figures["histogram"]), default=1)
    for bar in figures["histogram"]:
        drawn = "█" * max(round(WIDTH * bar["rows"] / most), int(bar["rows"] > 0))
        bars.add_row(f"{bar['from']:,} to {bar['to']:,}", drawn, f"{bar['rows']:,}")
    console.print(bars)
    print(over_length_line(figures))
    for told in figures["faults"][:SHOWN]:
        print(f"  {told['row']}: {told['field']}: {told['detail']}")
    if len(figures["faults"]) > SHOWN:
        print(f"  and {len(figures['faults']) - SHOWN:,} more that cannot train; --json lists them all")
    known = figures["rows"] - figures["counted"]
    print(f"counted now: {figures['counted']:,} rows; known from before: {known:,}")


def over_length_line(figures: dict[str, Any]) -> str:
    """What the over-length policy would do, in words."""
    if figures["max_tokens"] is None:
        return "over length: no limit (data.max_tokens)"
    told = figures["over_length"]
    line = f"over length: {told['rows']:,} rows are longer than data.max_tokens: {figures['max_tokens']:,}"
    if not told["rows"]:
        return line
    outcomes = {
        "dropped": told["rows_dropped"],
        f"train with fewer images ({told['images_dropped']:,} go)": told["rows_with_fewer_images"],
        f"train with smaller images ({told['images_resized']:,} shrink)": told["rows_with_smaller_images"],
    }
    if told["policy"] == "error":
        return f"{line}; the first of them stops the run (data.over_length: error)"
    does = ", ".join(f"{rows:,} {words}" for words, rows in outcomes.items() if rows)
    return f"{line}; data.over_length: {told['policy']}: {does}"
