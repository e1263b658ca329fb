"""Leakage: held-out rows whose images, or questions with answers, are also in the training data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from mmtune.data.dataset import IndexedSamples, LazySample, StreamedSamples
from mmtune.data.linked_rows import image_digests
from mmtune.data.media.image_content import content_digest, difference_hash, sampled_digest
from mmtune.data.media.media import Media
from mmtune.data.message import RowError, Sample, is_supervised, text_of
from mmtune.data.processes import map_rows
from mmtune.data.validation.issues import DataIssueError, Issue, new_issue
from mmtune.recipe.recipe import EvaluateSection
from mmtune.utils.errors import RecipeValueError

NEAR_BITS, NEAR_SHARE = 12, 8
"""Two images are near-duplicates if at most this many of the 256 bits of their hashes differ, and at most one in this many of the
bits that distinguish the picture from a flat one: pages with a few lines of text have few such bits."""
NEAR_IMAGES = 20_000
"""Maximum number of images of each side that are decoded and compared for near-duplicates."""
LEAKS = ("row_leaked", "image_leaked")
"""Issue types of held-out rows that are errors."""
LABEL = "comparing rows"
PAIRS = 2**22
"""Pairs of hashes that are compared at once."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Row = tuple[int, int]
"""The number of a row's source, and its position there."""
Digests = tuple[tuple[bytes, ...], tuple[bytes, ...]]
"""The digests of a row's images, and those of its images with each of its questions and answers."""


def row_digests(sample: Sample) -> Digests:
    """The digests of a row's images, and those of each supervised answer with its question and the images before it.

    The images are those of the last turn with images, so that few-shot examples before a question do not count. Spaces and case
    do not count either. Without images, a question with its answer is compared alone.

    Raises:
        RowError: an image cannot be read.
    """
    images: list[bytes] = []
    pairs = []
    shown: Sequence[bytes] = ()
    question = ""
    for message in sample.messages:
        here = image_digests(sample.id, (block["image"] for block in message["content"] if block["type"] == "image"))
        images += here
        shown = here or shown
        if message["role"] == "user":
            question = text_of(message)
        elif is_supervised(message):
            pairs.append(_pair_digest(shown, question, text_of(message)))
    return tuple(images), tuple(pairs)


def _pair_digest(images: Sequence[bytes], question: str, answer: str) -> bytes:
    texts = (" ".join(text.lower().split()) for text in (question, answer))
    text = "\0".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(b"".join(sorted(images)) + text, digest_size=16).digest()


class LeakageSearch:
    """Compares the rows of training sources with those of evaluation sources, which are added first.

    Args:
        load: the sample of a row by its source and position, as `row_digests` saw it. Raises RowError.
        warn: whether the recipe says `leakage: warn`.
    """

    def __init__(self, load: Callable[[int, int], Sample], warn: bool = False) -> None:
        self._load = load
        self._warn = warn
        self._held_out: list[tuple[Row, bool, Digests]] = []
        self._images: dict[bytes, Row] = {}
        self._searched: set[bytes] = set()
        self._found: dict[bytes, Row] = {}
        self._is_same: dict[bytes, bool] = {}
        self._training_images: dict[bytes, Row] = {}

    def add_held_out(self, source: int, position: int, digests: Digests, split_off: bool) -> None:
        """Add a held-out row; `split_off`: it comes from a training source with `held_out`, and so has no image in training."""
        images, pairs = digests
        self._held_out.append(((source, position), split_off, (images, pairs)))
        self._searched.update(images, pairs)
        for digest in images:
            self._images.setdefault(digest, (source, position))

    def add_training(self, source: int, position: int, digests: Digests) -> None:
        """Add a training row."""
        images, pairs = digests
        for digest in (*images, *pairs):
            if digest in self._searched:
                self._found.setdefault(digest, (source, position))
        for digest in images:
            if digest not in self._found:
                self._training_images.setdefault(digest, (source, position))
        if len(self._training_images) > 2 * NEAR_IMAGES:  # keep those with the smallest digests, a random sample
            smallest = sorted(self._training_images)[:NEAR_IMAGES]
            self._training_images = {digest: self._training_images[digest] for digest in smallest}

    def issues(self) -> Iterator[Issue]:
        """One issue for each held-out row that is also in the training data, or one of whose images is."""
        for row, split_off, (images, pairs) in self._held_out:
            shared = [image for image in images if image in self._found and self._is_same_image(image, row)]
            pair = next((each for each in pairs if each in self._found), None)
            if pair is not None and len(shared) == sum(image in self._found for image in images):
                name = "row_shared" if self._warn else "row_leaked"
                detail = f"the same question and answer{' about the same image' if images else ''} in training"
                yield self._issue(row, "row", name, detail, self._found[pair])
            elif shared:
                name = "image_leaked" if split_off and not self._warn else "image_shared"
                yield self._issue(row, "image", name, "the same image in training", self._found[shared[0]])

    def _issue(self, row: Row, where: str, name: str, detail: str, other: Row) -> Issue:
        return new_issue(self._load(*row).id, where, name, f"{detail}: {self._load(*other).id}")

    def _is_same_image(self, digest: bytes, row: Row) -> bool:
        """Whether the image of a held-out row and the training image with its sampled digest have the same bytes."""
        if digest not in self._is_same:
            contents = [content_digest(self._image(digest, each)) for each in (row, self._found[digest])]
            self._is_same[digest] = contents[0] == contents[1]
        return self._is_same[digest]

    def _image(self, digest: bytes, row: Row) -> Media:
        return next(image for image in self._load(*row).images if sampled_digest(image) == digest)

    def near_duplicates(self, processes: int | None = None) -> Iterator[Issue]:
        """An issue for each held-out image that looks like another image in training.

        Images are decoded in several processes, at most `NEAR_IMAGES` of each side; a line is printed if there are more.
        """
        held_out = {digest: row for digest, row in self._images.items() if digest not in self._found}
        if not held_out or not self._training_images:
            return
        rows, hashes = self._hash(held_out, "held-out", processes)
        training_rows, training_hashes = self._hash(self._training_images, "training", processes)
        for number, other, bits in nearest_hashes(hashes, training_hashes):
            detail = f"{bits} of 256 bits of the perceptual hash differ from those of an image in training"
            yield self._issue(rows[number], "image", "image_near_duplicate", detail, training_rows[other])

    def _hash(self, images: dict[bytes, Row], side: str, processes: int | None) -> tuple[list[Row], Hashes]:
        items = [(digest, images[digest]) for digest in sorted(images)[:NEAR_IMAGES]]
        if len(items) == NEAR_IMAGES:
            print(f"near-duplicates: at most {NEAR_IMAGES:,} {side} images are compared, drawn at random")
        results = map_rows(partial(self._hash_item, items), range(len(items)), processes, f"hashing {side} images")
        hashed = [(row, value) for (_, row), value in zip(items, results, strict=True) if isinstance(value, np.ndarray)]
        return [row for row, _ in hashed], np.array([value for _, value in hashed], np.uint64).reshape(-1, 4)

    def _hash_item(self, items: Sequence[tuple[bytes, Row]], number: int) -> Any:
        digest, row = items[number]
        try:
            return difference_hash(self._image(digest, row))
        except DataIssueError as error:  # reported by the check of the row
            return RowError(str(row), "image", error.detail, error.issue)


def nearest_hashes(hashes: Hashes, others: Hashes, most: int = NEAR_BITS) -> Iterator[tuple[int, int, int]]:
    """For each hash with another one that is near: its number, the number of the nearest other, and the bits that differ.

    Args:
        hashes, others: uint64 of shapes (n, 4) and (m, 4).
        most: `NEAR_BITS`.
    """
    if not len(others):
        return
    step = max(1, PAIRS // len(others))
    set_bits = np.bitwise_count(hashes).sum(axis=1, dtype=np.int64)
    limits = np.minimum(most, np.minimum(set_bits, 64 * hashes.shape[1] - set_bits) // NEAR_SHARE)
    for start in range(0, len(hashes), step):
        chunk = hashes[start : start + step]
        distances = np.zeros((len(chunk), len(others)), np.uint16)
        for word in range(hashes.shape[1]):
            distances += np.bitwise_count(chunk[:, word, None] ^ others[None, :, word])
        nearest = distances.argmin(axis=1)
        for number, other in enumerate(nearest.tolist()):
            if (bits := int(distances[number, other])) <= limits[start + number]:
                yield start + number, other, bits


def check_leakage(training: IndexedSamples | StreamedSamples, section: EvaluateSection, limit: int) -> None:
    """Compare up to `limit` training rows with all held-out rows, by content and not for near-duplicates.

    Prints a warning if they share images, and with `leakage: warn` also if they share rows. Rows that cannot be read are left
    out.

    Raises:
        RecipeValueError: held-out rows that are also in the training data.
    """
    handles = list(islice(training.subset(limit), limit))
    if not handles:
        return
    held_out = IndexedSamples([source.model_copy(update={"shots": None}) for source in section.sources])
    parts = [source.is_held_out for source in section.sources]
    asked = list(held_out.subset(len(held_out)))
    search = LeakageSearch(lambda side, row: (asked, handles)[side][row](), section.leakage == "warn")
    for index, digests in enumerate(map_rows(partial(_digests_of, asked), range(len(asked)), None, LABEL)):
        if not isinstance(digests, RowError):
            images, pairs = digests
            search.add_held_out(0, index, (images, pairs[-1:]), parts[held_out.source_of(index)])
    for index, digests in enumerate(map_rows(partial(_digests_of, handles), range(len(handles)), None, LABEL)):
        if not isinstance(digests, RowError):
            search.add_training(1, index, digests)
    issues = list(search.issues())
    errors = [issue for issue in issues if issue.severity == "error"]
    if warnings := [issue for issue in issues if issue.severity == "warning"]:
        print(f"warning: {len(warnings):,} of {len(held_out):,} held-out rows share an image or more with training rows:")
        print(_listing(warnings))
    if errors:
        raise RecipeValueError(
            "evaluate",
            f"{len(errors):,} of {len(held_out):,} held-out rows leak into the training data:\n{_listing(errors)}\n"
            "`mmtune data check` lists all; remove them from one side, or set evaluate.leakage: warn",
        )


def _digests_of(handles: Sequence[LazySample], index: int) -> Digests:
    return row_digests(handles[index]())


def _listing(issues: Sequence[Issue], shown: int = 5) -> str:
    lines = [f"  {issue.row}: {issue.detail}" for issue in issues[:shown]]
    return "\n".join(lines + [f"  and {len(issues) - shown:,} more"] * (len(issues) > shown))
