"""Report of a data plan: statistics as JSON, and tables for the terminal."""

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
from mmtune.data.sources.held_out_split import describe_split
from mmtune.planning.token_plan import IntArray, OverLengthOutcome, Plan, plan_section
from mmtune.recipe.recipe import DataSection

BARS, WIDTH = 12, 40
SHOWN = 10


Lengths = tuple[IndexedSamples, IntArray]
"""The rows, and the tokens of each row in training."""


def plan_data(section: DataSection, processor: ProcessorMixin) -> tuple[dict[str, Any], dict[str, Any], Lengths]:
    """Plan the training data of a recipe.

    Args:
        section: the recipe's `data`.
        processor: of the model, with its chat template.

    Returns:
        The statistics for JSON; the arguments of the memory estimate for the longest row in training: `tokens`, `images`,
        `image_size` (height, width), and the largest number of `supervised` tokens (empty if there is no row to train on); and
        the rows with their lengths.

    Raises:
        UserError: the data cannot be read, or tokens cannot be counted for this processor.
    """
    samples = IndexedSamples(section.train)
    plan, outcome = plan_section(samples, section, processor)
    statistics = plan_statistics(plan, outcome, section) | {"splits": samples.held_out}
    lengths = samples, outcome.lengths
    if not statistics["rows_trained"]:
        return statistics, {}, lengths
    row = int(outcome.lengths.argmax())
    fitted = fit_to_budget(samples[row], processor, section.max_tokens, section.over_length, section.supervise)
    longest: dict[str, Any] = {"tokens": fitted.counts.tokens, "images": fitted.counts.images}
    longest["supervised"] = int(plan.supervised[outcome.lengths > 0].max())
    if fitted.counts.images:
        width, height = _typical_size(fitted.sample, processor)
        longest["image_size"] = (height, width)
    return statistics, longest, lengths


def _typical_size(sample: Sample, processor: ProcessorMixin) -> tuple[int, int]:
    """The size of the largest image of a sample for which as many images of that size have at most the tokens of its images."""
    sizes = image_sizes(sample.messages)

    def characters(images: Sequence[tuple[int, int]]) -> int:
        return sum(map(len, image_replacements(processor, list(images))))

    whole = characters(sizes)
    by_area = sorted(sizes, key=lambda size: size[0] * size[1], reverse=True)
    return next((size for size in by_area if characters([size] * len(sizes)) <= whole), by_area[-1])


def plan_statistics(plan: Plan, outcome: OverLengthOutcome, section: DataSection) -> dict[str, Any]:
    """Statistics of a plan.

    Args:
        plan: the counts.
        outcome: of the over-length policy.
        section: the recipe's `data`. With `packing`, the capacity of a pack is `tokens_per_batch`, or `max_tokens`, or else the
            length of the longest row; without it, `packing` is null.

    Returns:
        Plain values, for JSON.
    """
    trained = outcome.lengths[outcome.lengths > 0]
    valid = plan.tokens[plan.tokens > 0]
    return {
        "rows": len(plan),
        "rows_invalid": len(plan.errors),
        "rows_trained": len(trained),
        "tokens": int(plan.tokens.sum()),
        "image_tokens": int(plan.media_tokens.sum()),
        "supervised_tokens": int(plan.supervised.sum()),
        "images": int(plan.images.sum()),
        "longest": int(valid.max(initial=0)),
        "median": int(np.median(valid)) if len(valid) else 0,
        "histogram": [{"from": first, "to": last, "rows": rows} for first, last, rows in histogram(valid)],
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
        "errors": [{"row": e.row, "field": e.field, "detail": e.detail} for _, e in sorted(plan.errors.items())],
        "counted": plan.counted,
        "cache_file": None if plan.cache_file is None else str(plan.cache_file),
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
    """Number of rows in equal ranges of length: (first, last, rows), at most `bars` of them.

    The width of a range is one of 1, 2, 5, 10, 20, 50, ...
    """
    if not len(lengths):
        return []
    most = int(lengths.max())
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * bars > most)
    counted = Counter((lengths // width).tolist())
    return [(bar * width, (bar + 1) * width - 1, counted[bar]) for bar in range(int(lengths.min()) // width, most // width + 1)]


def print_data_plan(statistics: dict[str, Any]) -> None:
    """Print the statistics.

    Args:
        statistics: from `plan_data`, with the optimizer steps as `steps` and `MixtureBatchSampler.largest` as `largest_batch`.
    """
    console = StyledConsole()
    tokens = max(1, statistics["tokens"])
    table = Table(title="Data", title_justify="left", show_header=False)
    table.add_column("statistic")
    table.add_column("value", justify="right")
    table.add_column("note")
    table.add_row(
        "rows", f"{statistics['rows']:,}", f"{statistics['rows_invalid']:,} invalid" if statistics["rows_invalid"] else ""
    )
    table.add_row(
        "tokens", f"{statistics['tokens']:,}", f"longest row {statistics['longest']:,}, median {statistics['median']:,}"
    )
    share = f"{statistics['image_tokens'] / tokens:.0%}, of {statistics['images']:,} images"
    table.add_row("image tokens", f"{statistics['image_tokens']:,}", share)
    table.add_row("supervised tokens", f"{statistics['supervised_tokens']:,}", f"{statistics['supervised_tokens'] / tokens:.0%}")
    if packing := statistics["packing"]:
        note = f"of {packing['capacity']:,} tokens, {packing['efficiency']:.1%} full"
        table.add_row("packs", f"{packing['packs']:,}", note)
    table.add_row("optimizer steps", f"{statistics['steps']:,}", "in one process")
    batch = statistics["largest_batch"]
    padding = "" if batch["tokens"] == batch["padded_tokens"] else f" with padding, {batch['tokens']:,} without"
    table.add_row("largest batch", f"{batch['padded_tokens']:,}", f"tokens{padding}, {batch['rows']} rows")
    console.print_table(table)
    bars = Table(title="Length of a row in tokens", title_justify="left", show_header=False)
    for number in range(3):
        bars.add_column(justify="left" if number == 1 else "right")
    most = max((bar["rows"] for bar in statistics["histogram"]), default=1)
    for bar in statistics["histogram"]:
        drawn = "█" * max(round(WIDTH * bar["rows"] / most), int(bar["rows"] > 0))
        bars.add_row(f"{bar['from']:,} to {bar['to']:,}", drawn, f"{bar['rows']:,}")
    console.print(bars)
    print(over_length_line(statistics))
    for name, counts in statistics["splits"].items():
        print(describe_split(name, counts))
    for error in statistics["errors"][:SHOWN]:
        print(f"  {error['row']}: {error['field']}: {error['detail']}")
    if len(statistics["errors"]) > SHOWN:
        print(f"  and {len(statistics['errors']) - SHOWN:,} more invalid rows; --json lists all")
    cached = statistics["rows"] - statistics["counted"]
    print(f"counted: {statistics['counted']:,} rows; from the cache: {cached:,}")


def over_length_line(statistics: dict[str, Any]) -> str:
    """The effect of the over-length policy, as one line."""
    if statistics["max_tokens"] is None:
        return "over length: no limit (data.max_tokens)"
    counts = statistics["over_length"]
    line = f"over length: {counts['rows']:,} rows are longer than data.max_tokens: {statistics['max_tokens']:,}"
    if not counts["rows"]:
        return line
    outcomes = {
        "dropped": counts["rows_dropped"],
        f"trained with fewer images ({counts['images_dropped']:,} dropped)": counts["rows_with_fewer_images"],
        f"trained with smaller images ({counts['images_resized']:,} resized)": counts["rows_with_smaller_images"],
    }
    if counts["policy"] == "error":
        return f"{line}; the first of them stops the run (data.over_length: error)"
    effects = ", ".join(f"{rows:,} {effect}" for effect, rows in outcomes.items() if rows)
    return f"{line}; data.over_length: {counts['policy']}: {effects}"
