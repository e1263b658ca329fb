"""Token plan: the exact length of every row, counted without decoding images or loading weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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
from mmtune.data.sources.row_cache import Arrays, RowCache, cache_directory
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.planning.plan_cache import plan_key
from mmtune.recipe.recipe import DataSection

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Stamp = tuple[str, int, int]
"""Path, size in bytes and modification time in nanoseconds of a media file."""


@dataclass(frozen=True)
class MediaStamps:
    """The media files of the rows, with the stamps at the time of counting.

    Attributes:
        files: every file, once.
        sizes, times: of each file, in bytes and in nanoseconds.
        counts: the number of media of each row.
        uses: indices into `files`, row by row.
    """

    files: list[str]
    sizes: IntArray
    times: IntArray
    counts: IntArray
    uses: IntArray

    def stale_rows(self) -> IntArray:
        """Rows with a file that has changed or was deleted since."""
        stamps = np.array([_stamp(file)[1:] for file in self.files], dtype=np.int64).reshape(-1, 2)
        changed = (stamps[:, 0] != self.sizes) | (stamps[:, 1] != self.times)
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        return np.unique(rows[changed[self.uses]])


@dataclass(frozen=True)
class Plan:
    """Token counts of every row. Invalid rows have zeros and are listed in `errors`.

    Attributes:
        tokens: of each row, with image tokens.
        media_tokens: image tokens of each row.
        supervised: supervised tokens of each row.
        images: the number of images of each row.
        faults: rows that cannot train, by their number, with the reason.
        counted: the number of rows counted now; the others come from the cache.
        cache_file: the file that holds the plan, if any.
    """

    tokens: IntArray
    media_tokens: IntArray
    supervised: IntArray
    images: IntArray
    errors: dict[int, RowError]
    counted: int = 0
    cache_file: Path | None = None
    media: MediaStamps | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)


def build_plan(
    samples: Sequence[Sample],
    processor: ProcessorMixin,
    supervise: Supervise = "all",
    *,
    cache: RowCache | None = None,
    processes: int | None = None,
    dist: DistributedContext = SINGLE_PROCESS,
) -> Plan:
    """Count the tokens of every row, or with a cache only of new rows and rows with changed media.

    Each process of a run counts its share of these rows; all return the same plan. Only the main process uses the cache,
    and has the plan's `media`.

    Args:
        samples: the rows. A RowError of a row is recorded in the plan.
        processor: of the model, with its chat template.
        supervise: the recipe's `data.supervise`.
        cache: the cache of the plan, if any.
        processes: the number of worker processes of each process, as in `map_rows`.
        dist: the processes of the run.

    Raises:
        UserError: tokens cannot be counted for this processor.
    """
    known = _read_cache(cache, len(samples)) if cache and dist.is_main_process else None
    if known is None:
        stale = np.arange(len(samples))
        plan = _empty(len(samples))
    else:
        plan = known
        assert plan.media is not None
        stale = np.union1d(plan.media.stale_rows(), np.array(sorted(plan.errors), dtype=np.int64))
    stale = dist.broadcast_object(stale)
    counts_by_arithmetic(processor)  # determined once here, not in every worker process
    results = _map_shares(partial(_count_row, samples, processor, supervise), stale, processes, "counting tokens", dist)
    if dist.is_main_process:
        plan, changed = _with_counts(plan, stale, results)
        cache_file = None
        if cache is not None:
            there = next((path for path in cache.paths if path.exists()), None)
            cache_file = _write_cache(cache, plan) if changed or known is None else there
        plan = replace(plan, counted=len(stale), cache_file=cache_file)
    shared: Plan = dist.broadcast_object(replace(plan, media=None))
    return plan if dist.is_main_process else shared


def _map_shares(
    function: Callable[[int], Any], rows: IntArray, processes: int | None, description: str, dist: DistributedContext
) -> Iterator[Any]:
    """`map_rows` with the rows divided among the processes of a run; each returns the results of all, in order."""
    own = map_rows(function, rows[dist.rank :: dist.size], processes, description)
    if dist.size == 1:
        return own
    shares = dist.all_gather_object(list(own))
    return (shares[number % dist.size][number // dist.size] for number in range(len(rows)))


def _count_row(samples: Sequence[Sample], processor: ProcessorMixin, supervise: Supervise, index: int) -> Any:
    """The four counts of a row and the stamps of its media."""
    sample = samples[index]
    stamps = [_stamp(_file_of(image)) for image in sample.images]  # before the files are read
    counts = count_tokens(sample, processor, supervise)
    return (counts.tokens, counts.media_tokens, counts.supervised, counts.images), stamps


def _file_of(image: Any) -> str:
    """The path of an image, or of the file that contains an embedded image."""
    return str(getattr(image, "container", image))


def _stamp(file: str) -> Stamp:
    try:
        status = os.stat(file)  # noqa: PTH116  (called for every media file)
    except (OSError, ValueError):
        return file, -1, -1
    return file, status.st_size, status.st_mtime_ns


# ---- cached counts


def _empty(rows: int) -> Plan:
    none, nothing = np.zeros(0, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    return Plan(nothing, nothing, nothing, nothing, {}, media=MediaStamps([], none, none, nothing, none))


def _with_counts(plan: Plan, rows: IntArray, results: Iterator[Any]) -> tuple[Plan, bool]:
    """The plan with new results for some rows, and whether anything changed."""
    columns = [column.copy() for column in (plan.tokens, plan.media_tokens, plan.supervised, plan.images)]
    errors = dict(plan.errors)
    assert plan.media is not None
    stamps: dict[int, list[Stamp]] = {}
    for row, result in zip(rows.tolist(), results, strict=True):
        if isinstance(result, RowError):
            numbers, stamps[row] = (0, 0, 0, 0), []
            errors[row] = result
        else:
            numbers, stamps[row] = result
            errors.pop(row, None)
        for column, number in zip(columns, numbers, strict=True):
            column[row] = number
    new, old = ({row: str(error) for row, error in each.items()} for each in (errors, plan.errors))
    if new == old and stamps.keys() <= errors.keys():
        return plan, False
    tokens, media_tokens, supervised, images = columns
    return Plan(tokens, media_tokens, supervised, images, errors, media=_restamped(plan.media, stamps)), True


def _restamped(media: MediaStamps, stamps: dict[int, list[Stamp]]) -> MediaStamps:
    """Replace the files of some rows."""
    numbers: dict[str, int] = {}
    newest: dict[str, tuple[int, int]] = {}
    counts, uses = [], []
    starts = np.concatenate([[0], np.cumsum(media.counts)])
    for row in range(len(media.counts)):
        if row in stamps:
            row_stamps = stamps[row]
        else:
            used = media.uses[starts[row] : starts[row + 1]].tolist()
            row_stamps = [(media.files[number], int(media.sizes[number]), int(media.times[number])) for number in used]
        for file, size, time in row_stamps:
            uses.append(numbers.setdefault(file, len(numbers)))
            if row in stamps or file not in newest:
                newest[file] = (size, time)
        counts.append(len(row_stamps))
    pairs = np.array([newest[file] for file in numbers], dtype=np.int64).reshape(-1, 2)
    as_array = [np.array(values, dtype=np.int64) for values in (counts, uses)]
    return MediaStamps(list(numbers), pairs[:, 0], pairs[:, 1], *as_array)


COLUMNS = ("tokens", "media_tokens", "supervised", "images")
STAMPS = ("sizes", "times", "counts", "uses")


def _write_cache(cache: RowCache, plan: Plan) -> Path | None:
    assert plan.media is not None
    arrays: Arrays = {name: getattr(plan, name) for name in COLUMNS} | {name: getattr(plan.media, name) for name in STAMPS}
    errors = [[row, error.row, error.field, error.detail] for row, error in plan.errors.items()]
    return cache.write(arrays, {"files": plan.media.files, "errors": errors})


def _read_cache(cache: RowCache, rows: int) -> Plan | None:
    read = cache.read()
    if read is None:
        return None
    arrays, notes = read
    if len(arrays["tokens"]) != rows:  # rows on the hub may change under the same name
        return None
    media = MediaStamps(notes["files"], *(arrays[name] for name in STAMPS))
    errors = {row: RowError(*fields) for row, *fields in notes["errors"]}
    tokens, media_tokens, supervised, images = (arrays[name] for name in COLUMNS)
    return Plan(tokens, media_tokens, supervised, images, errors, media=media)


# ---- the over-length policy


@dataclass(frozen=True)
class OverLengthOutcome:
    """Effect of the over-length policy on the rows.

    Attributes:
        lengths: tokens of each row in training; 0 for rows that are left out.
        over_length: the number of rows longer than the limit.
        dropped: the indices of rows that are left out; under `error` the first of them stops the run.
        fewer_images: the number of rows that lose images; `images_dropped`: the number of these images.
        smaller_images: the number of rows with resized images; `images_resized`: the number of these images.
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
    dist: DistributedContext = SINGLE_PROCESS,
) -> OverLengthOutcome:
    """Predict the effect of the over-length policy. Only rows that are too long are read again.

    Args:
        plan: of the same samples, processor and `supervise`.
        max_tokens: the limit; None: no limit.
        policy: as in `fit_to_budget`.
        processes, dist: as `build_plan`.
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
    for row, result in zip(longer.tolist(), _map_shares(fits, longer, processes, "fitting long rows", dist), strict=True):
        if isinstance(result, RowError):
            dropped.append(row)
            lengths[row] = 0
        else:
            lengths[row], removed, resized = result
            fewer, images_dropped = fewer + (removed > 0), images_dropped + removed
            smaller, images_resized = smaller + (resized > 0), images_resized + resized
    return OverLengthOutcome(lengths, len(longer), dropped, fewer, images_dropped, smaller, images_resized)


def plan_section(
    samples: Sequence[Sample], section: DataSection, processor: ProcessorMixin, dist: DistributedContext = SINGLE_PROCESS
) -> tuple[Plan, OverLengthOutcome]:
    """The cached plan of a recipe's rows, and the effect of its over-length policy; see `build_plan`."""
    cache = RowCache(cache_directory(section.train), plan_key(section.train, processor, section.supervise), "plan")
    plan = build_plan(samples, processor, section.supervise, cache=cache, dist=dist)
    outcome = predict_outcome(plan, samples, processor, section.max_tokens, section.over_length, section.supervise, dist=dist)
    return plan, outcome


def _fit_row(
    samples: Sequence[Sample], processor: ProcessorMixin, supervise: Supervise, max_tokens: int, policy: Policy, index: int
) -> Any:
    fitted = fit_to_budget(samples[index], processor, max_tokens, policy, supervise)
    return fitted.counts.tokens, fitted.dropped, fitted.resized
