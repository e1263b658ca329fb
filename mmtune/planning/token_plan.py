"""The plan of a data set: how long every row is, before a pixel is decoded or a weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import Supervise
from mmtune.data.encoding.over_length import Policy, fit_to_budget
from mmtune.data.encoding.token_counts import count_tokens, counts_by_arithmetic
from mmtune.data.message import RowError, Sample
from mmtune.data.processes import map_rows
from mmtune.planning.plan_cache import Arrays, PlanCache, plan_directory, plan_key
from mmtune.recipe.recipe import DataSection

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Stamp = tuple[str, int, int]
"""Of a media file: its path, size in bytes and time of change in nanoseconds."""


@dataclass(frozen=True)
class MediaStamps:
    """Which media files the rows have, and when they were counted.

    Attributes:
        files: every file once.
        sizes, times: of each file, in bytes and in nanoseconds.
        counts: of each row, how many media it has.
        uses: the numbers of the rows' files, row after row.
    """

    files: list[str]
    sizes: IntArray
    times: IntArray
    counts: IntArray
    uses: IntArray

    def stale_rows(self) -> IntArray:
        """Rows with a file that has changed since, or is gone."""
        found = np.array([_stamp(file)[1:] for file in self.files], dtype=np.int64).reshape(-1, 2)
        changed = (found[:, 0] != self.sizes) | (found[:, 1] != self.times)
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        return np.unique(rows[changed[self.uses]])


@dataclass(frozen=True)
class Plan:
    """How long every row is. Rows that cannot be counted have zeros, and stand in `faults`.

    Attributes:
        tokens: of each row, image tokens included.
        media_tokens: those that stand for images.
        supervised: those that the loss falls on.
        images: how many images each row has.
        faults: rows that cannot train, by their number, with the reason.
        counted: how many rows were counted now; the others were known from before.
        kept: the file that keeps the plan; None where there is none.
    """

    tokens: IntArray
    media_tokens: IntArray
    supervised: IntArray
    images: IntArray
    faults: dict[int, RowError]
    counted: int = 0
    kept: Path | None = None
    media: MediaStamps | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)


def build_plan(
    samples: Sequence[Sample],
    processor: ProcessorMixin,
    supervise: Supervise = "all",
    *,
    cache: PlanCache | None = None,
    processes: int | None = None,
) -> Plan:
    """Count every row, or only those that are new or whose media have changed since they were counted.

    Args:
        samples: the rows; a row that raises RowError is a fault of the plan.
        processor: the model's, its chat template settled.
        supervise: the recipe's `data.supervise`.
        cache: where the plan is kept; None keeps nothing.
        processes: how many count, as `map_rows`.

    Raises:
        UserError: a processor whose tokens cannot be counted.
    """
    known = _known(cache, len(samples)) if cache else None
    if known is None:
        stale = np.arange(len(samples))
        plan = _empty(len(samples))
    else:
        plan = known
        assert plan.media is not None
        stale = np.union1d(plan.media.stale_rows(), np.array(sorted(plan.faults), dtype=np.int64))
    counts_by_arithmetic(processor)  # found out once, here, and not in every process
    found = map_rows(partial(_count_row, samples, processor, supervise), stale, processes, "counting tokens")
    plan, changed = _with_counts(plan, stale, found)
    kept = None
    if cache is not None:
        there = next((place for place in cache.places if place.exists()), None)
        kept = _keep(cache, plan) if changed or known is None else there
    return replace(plan, counted=len(stale), kept=kept)


def _count_row(samples: Sequence[Sample], processor: ProcessorMixin, supervise: Supervise, index: int) -> Any:
    """Of one row its four numbers and the stamps of its media."""
    sample = samples[index]
    stamps = [_stamp(_file_of(image)) for image in sample.images]  # before they are read
    counts = count_tokens(sample, processor, supervise)
    return (counts.tokens, counts.media_tokens, counts.supervised, counts.images), stamps


def _file_of(image: Any) -> str:
    """The file itself, or the one that an embedded image lies in."""
    return str(getattr(image, "container", image))


def _stamp(file: str) -> Stamp:
    try:
        status = os.stat(file)  # noqa: PTH116  (a million of them)
    except (OSError, ValueError):
        return file, -1, -1
    return file, status.st_size, status.st_mtime_ns


# ---- what is known already


def _empty(rows: int) -> Plan:
    none, nothing = np.zeros(0, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    return Plan(nothing, nothing, nothing, nothing, {}, media=MediaStamps([], none, none, nothing, none))


def _with_counts(plan: Plan, rows: IntArray, found: Iterator[Any]) -> tuple[Plan, bool]:
    """The plan with some rows counted again, and whether anything is different."""
    columns = [column.copy() for column in (plan.tokens, plan.media_tokens, plan.supervised, plan.images)]
    faults = dict(plan.faults)
    assert plan.media is not None
    stamps: dict[int, list[Stamp]] = {}
    for row, result in zip(rows.tolist(), found, strict=True):
        if isinstance(result, RowError):
            numbers, stamps[row] = (0, 0, 0, 0), []
            faults[row] = result
        else:
            numbers, stamps[row] = result
            faults.pop(row, None)
        for column, number in zip(columns, numbers, strict=True):
            column[row] = number
    told, before = ({row: str(error) for row, error in errors.items()} for errors in (faults, plan.faults))
    if told == before and stamps.keys() <= faults.keys():
        return plan, False
    tokens, media_tokens, supervised, images = columns
    return Plan(tokens, media_tokens, supervised, images, faults, media=_restamped(plan.media, stamps)), True


def _restamped(media: MediaStamps, stamps: dict[int, list[Stamp]]) -> MediaStamps:
    """With the files of some rows exchanged for others."""
    numbers: dict[str, int] = {}
    newest: dict[str, tuple[int, int]] = {}
    counts, uses = [], []
    starts = np.concatenate([[0], np.cumsum(media.counts)])
    for row in range(len(media.counts)):
        if row in stamps:
            mine = stamps[row]
        else:
            used = media.uses[starts[row] : starts[row + 1]].tolist()
            mine = [(media.files[number], int(media.sizes[number]), int(media.times[number])) for number in used]
        for file, size, time in mine:
            uses.append(numbers.setdefault(file, len(numbers)))
            if row in stamps or file not in newest:
                newest[file] = (size, time)
        counts.append(len(mine))
    pairs = np.array([newest[file] for file in numbers], dtype=np.int64).reshape(-1, 2)
    as_array = [np.array(values, dtype=np.int64) for values in (counts, uses)]
    return MediaStamps(list(numbers), pairs[:, 0], pairs[:, 1], *as_array)


COLUMNS = ("tokens", "media_tokens", "supervised", "images")
STAMPS = ("sizes", "times", "counts", "uses")


def _keep(cache: PlanCache, plan: Plan) -> Path | None:
    assert plan.media is not None
    arrays: Arrays = {name: getattr(plan, name) for name in COLUMNS} | {name: getattr(plan.media, name) for name in STAMPS}
    faults = [[row, error.row, error.field, error.detail] for row, error in plan.faults.items()]
    return cache.write(arrays, {"files": plan.media.files, "faults": faults})


def _known(cache: PlanCache, rows: int) -> Plan | None:
    read = cache.read()
    if read is None:
        return None
    arrays, notes = read
    if len(arrays["tokens"]) != rows:  # rows on the hub may have changed under the same name
        return None
    media = MediaStamps(notes["files"], *(arrays[name] for name in STAMPS))
    faults = {row: RowError(*told) for row, *told in notes["faults"]}
    tokens, media_tokens, supervised, images = (arrays[name] for name in COLUMNS)
    return Plan(tokens, media_tokens, supervised, images, faults, media=media)


# ---- what the over-length policy makes of it


@dataclass(frozen=True)
class OverLengthOutcome:
    """What becomes of the rows under a policy.

    Attributes:
        lengths: tokens of each row as it would train; 0 for one that would not.
        over_length: how many rows are longer than the limit.
        dropped: the numbers of those of them that would not train; under `error` the first of them stops the run.
        fewer_images: how many rows would train without some of their images, and `images_dropped` without how many in all.
        smaller_images: how many rows would train with smaller images, and `images_resized` how many those are.
    """

    lengths: IntArray
    over_length: int = 0
    dropped: list[int] = field(default_factory=list)
    fewer_images: int = 0
    images_dropped: int = 0
    smaller_images: int = 0
    images_resized: int = 0


def predict_outcome(
    plan: Plan,
    samples: Sequence[Sample],
    processor: ProcessorMixin,
    max_tokens: int | None,
    policy: Policy,
    supervise: Supervise = "all",
    *,
    processes: int | None = None,
) -> OverLengthOutcome:
    """What the over-length policy makes of a plan's rows; only those that are too long are looked at again.

    Args:
        plan: of the same samples, processor and `supervise`.
        max_tokens: the limit; None is no limit.
        policy: as `fit`.
        processes: as `build_plan`.
    """
    lengths = plan.tokens.copy()
    if max_tokens is None:
        return OverLengthOutcome(lengths)
    longer = np.flatnonzero(lengths > max_tokens)
    if policy in ("error", "drop_sample"):
        lengths[longer] = 0
        return OverLengthOutcome(lengths, len(longer), longer.tolist())
    fits = partial(_fit_row, samples, processor, supervise, max_tokens, policy)
    dropped: list[int] = []
    fewer = images_dropped = smaller = images_resized = 0
    for row, result in zip(longer.tolist(), map_rows(fits, longer, processes, "fitting long rows"), strict=True):
        if isinstance(result, RowError):
            dropped.append(row)
            lengths[row] = 0
        else:
            lengths[row], gone, resized = result
            fewer, images_dropped = fewer + (gone > 0), images_dropped + gone
            smaller, images_resized = smaller + (resized > 0), images_resized + resized
    return OverLengthOutcome(lengths, len(longer), dropped, fewer, images_dropped, smaller, images_resized)


def plan_section(samples: Sequence[Sample], section: DataSection, processor: ProcessorMixin) -> tuple[Plan, OverLengthOutcome]:
    """The plan of a recipe's rows, kept beside them, and what the recipe's policy makes of it; raises as `build_plan`."""
    cache = PlanCache(plan_directory(section.train), plan_key(section.train, processor, section.supervise))
    plan = build_plan(samples, processor, section.supervise, cache=cache)
    return plan, predict_outcome(plan, samples, processor, section.max_tokens, section.over_length, section.supervise)


def _fit_row(
    samples: Sequence[Sample], processor: ProcessorMixin, supervise: Supervise, max_tokens: int, policy: Policy, index: int
) -> Any:
    fitted = fit_to_budget(samples[index], processor, max_tokens, policy, supervise)
    return fitted.counts.tokens, fitted.dropped, fitted.resized
