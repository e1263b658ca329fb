"""Rows that are about the same image or document: linked directly, or through other rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from mmtune.data.media.image_content import sampled_digest
from mmtune.data.media.media import Media
from mmtune.data.message import RowError, Sample
from mmtune.utils.errors import reason_of

Keys = tuple[bytes, ...]
"""What links a row to others; rows with a key in common are linked."""


def row_keys(sample: Sample, source: str = "") -> Keys:
    """The digests of a row's images, by content, and of its document (`cluster` of the data template); empty without both.

    Images of few-shot examples do not count.

    Args:
        sample: the row.
        source: what its document belongs to: the same name in two sources is not the same document.

    Raises:
        RowError: an image cannot be read.
    """
    images = image_digests(sample.id, sample.own_images)
    return (*images, text_key(f"document{source}", sample.cluster)) if sample.cluster else images


def image_digests(row_id: str, images: Iterable[Media]) -> tuple[bytes, ...]:
    """`sampled_digest` of each image of a row.

    Raises:
        RowError: an image cannot be read.
    """
    try:
        return tuple(sampled_digest(image) for image in images)
    except (OSError, ValueError) as error:
        raise RowError(row_id, "image", reason_of(error), "image_unreadable") from error


def text_key(kind: str, text: str) -> bytes:
    """The digest of a text, 16 bytes; white space does not matter."""
    normalized = f"{kind} {' '.join(text.split())}"
    return hashlib.blake2b(normalized.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def first_linked_keys(keys: Sequence[Keys]) -> list[bytes | None]:
    """For each row, the first key of the first row that is linked to it, directly or through other rows; None without keys."""
    parents: dict[bytes, bytes] = {}
    order: dict[bytes, int] = {}

    def root(key: bytes) -> bytes:
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for row in keys:
        for key in row:
            order.setdefault(key, len(order))
            parents.setdefault(key, key)
        roots = {root(key) for key in row}
        if len(roots) > 1:
            first = min(roots, key=order.__getitem__)
            parents.update(dict.fromkeys(roots, first))
    return [root(row[0]) if row else None for row in keys]
