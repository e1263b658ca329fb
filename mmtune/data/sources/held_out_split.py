"""Held-out rows of a training source: a split by image, so that rows that share an image are on one side.

Rows are linked if they have an image of the same content or, where the data template names it with `cluster`, the document in
common; rows without both, if they have the same first question.
The first image (or question) of each group of linked rows, hashed with the source's seed, decides its side. The side of a row
thus does not depend on rows that are added after it, on the path of an image, or on the format of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import numpy as np

from mmtune.data.linked_rows import Keys, first_linked_keys, row_keys, text_key
from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.processes import map_rows
from mmtune.data.sources.row_cache import RowCache, cache_directory, cache_key, file_signatures
from mmtune.data.sources.rows import Row, Rows
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError

FORMAT = 2
"""Version of the split and of its cache file."""

IndexArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class HeldOutSplit:
    """The split of a source.

    Attributes:
        held_out: indices of the held-out rows, in order, shape (held-out rows,).
        rows: the number of all rows.
        groups: the number of groups of linked rows; an image that no row shares with another image is one group.
        held_out_groups: the number of groups that are held out.
    """

    held_out: IndexArray
    rows: int
    groups: int
    held_out_groups: int

    @property
    def training(self) -> IndexArray:
        """Indices of the other rows, in order."""
        return np.setdiff1d(np.arange(self.rows), self.held_out, assume_unique=True)

    def counts(self) -> dict[str, int]:
        """The counts, for reports."""
        return {
            "rows": self.rows,
            "held_out_rows": len(self.held_out),
            "groups": self.groups,
            "held_out_groups": self.held_out_groups,
        }


def describe_split(source: str, counts: dict[str, int]) -> str:
    """One line for the terminal from `HeldOutSplit.counts`."""
    return (
        f"held out: {source}: {counts['held_out_rows']:,} of {counts['rows']:,} rows, all of "
        f"{counts['held_out_groups']:,} of {counts['groups']:,} images or questions"
    )


def split_source(source: Source, rows: Rows, sample_of: Callable[[str, Row], Sample]) -> HeldOutSplit:
    """Split the rows of a source, in several processes; the split is cached beside the data.

    Args:
        source: a source with `held_out`.
        rows: its rows.
        sample_of: the sample of a row, without few-shot examples. Rows for which it raises a RowError stay training rows.

    Raises:
        UserError: one of the sides would have no row.
    """
    share = source.held_out
    assert share is not None
    settings = source.model_dump(mode="json", exclude={"weight", "augment", "shots", "system", "window"})
    inputs = {"version": metadata.version("mmtune"), "format": FORMAT, "source": settings, "files": file_signatures([source])}
    cache = RowCache(cache_directory([source]), cache_key(inputs), "split")
    split = _read_split(cache, len(rows))
    if split is None:
        results = map_rows(partial(_row_keys, rows, sample_of), range(len(rows)), None, "splitting rows by image")
        keys: list[Keys] = [() if isinstance(result, RowError) else result for result in results]
        split = split_rows(keys, share, source.seed)
        if all(keys):  # an image that is missing now would change the split when it is there
            cache.write({"held_out": split.held_out}, split.counts())
    check_split(split, source.path, share)
    return split


def _read_split(cache: RowCache, rows: int) -> HeldOutSplit | None:
    if (read := cache.read()) is None or read[1]["rows"] != rows:  # rows on the hub may change under the same name
        return None
    arrays, counts = read
    return HeldOutSplit(arrays["held_out"], rows, counts["groups"], counts["held_out_groups"])


def _row_keys(rows: Rows, sample_of: Callable[[str, Row], Sample], index: int) -> Keys:
    """What links a row to others: the content of its images, and the document that its template names (`cluster`).

    Without both it is the row's first question.

    Raises:
        RowError: the row or one of its images cannot be read.
    """
    row_id, row = rows[index]
    sample = sample_of(row_id, row)
    question = next((text_of(message) for message in sample.messages if message["role"] == "user"), "")
    return row_keys(sample) or (text_key("question", question),)


def split_rows(keys: Sequence[Keys], share: float, seed: int) -> HeldOutSplit:
    """Split rows into training rows and held-out rows.

    Args:
        keys: of every row. Rows without keys stay training rows.
        share: below 1, the probability of a group to be held out; otherwise a number of rows: groups are held out in the order of
            their hashes until there are at least that many rows.
        seed: the source's seed.
    """
    groups: dict[bytes, int] = {}  # of the key that decides: the number of rows
    deciding = first_linked_keys(keys)
    for key in deciding:
        if key is not None:
            groups[key] = groups.get(key, 0) + 1
    places = {key: _place(key, seed) for key in groups}
    if share < 1:
        chosen = {key for key, place in places.items() if place < share}
    else:
        chosen, rows = set(), 0
        for key in sorted(groups, key=places.__getitem__):
            if rows >= share:
                break
            chosen.add(key)
            rows += groups[key]
    held_out = np.array([index for index, key in enumerate(deciding) if key in chosen], dtype=np.int64)
    return HeldOutSplit(held_out, len(keys), len(groups), len(chosen))


def check_split(split: HeldOutSplit, path: str, share: float) -> None:
    """
    Raises:
        UserError: one of the sides has no row.
    """
    if 0 < len(split.held_out) < split.rows:
        return
    side = "no row is held out" if len(split.held_out) == 0 else "all rows are held out, and none is left for training"
    images = f"{split.rows:,} rows with {split.groups:,} images (or questions of rows without images)"
    raise UserError(
        f"{path}: held_out: {share:g}: {side}: the source has {images}, and an image is held out as a whole; give another "
        "fraction, or a number of rows"
    )


def _place(key: bytes, seed: int) -> float:
    """A number in [0, 1) that the key and the seed determine."""
    digest = hashlib.blake2b(f"held_out {seed} ".encode() + key, digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
