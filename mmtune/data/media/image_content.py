"""Content of image files: digests that are equal for equal bytes, and a perceptual hash that is close for similar pictures."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image

from mmtune.data.media.media import EmbeddedMedia, ImageView, Media, open_image, open_image_header, open_media
from mmtune.data.validation.issues import DataIssueError

BLOCK, BLOCKS = 4096, 16
"""Bytes of a block, and the number of blocks that `sampled_digest` reads of a large file."""
HASH_EDGE = 16
"""The edge of the picture that `difference_hash` compares, in pixels."""
HASH_BITS = HASH_EDGE * HASH_EDGE
MIN_SET_BITS = HASH_BITS // 16
"""A hash with fewer bits set, or fewer bits not set, is that of a flat picture and is close to that of every other flat one."""


def sampled_digest(media: Media) -> bytes:
    """A digest of 16 bytes, equal for equal bytes, of the size of a file and at most 64 KiB of it.

    A file of up to `BLOCK` x `BLOCKS` bytes is read as a whole; of a larger one evenly spaced blocks with its beginning and end.
    Different large files can thus have the same digest.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    with open_media(media) as file:
        size = file.seek(0, io.SEEK_END)
        digest = hashlib.blake2b(size.to_bytes(8), digest_size=16)
        if size <= BLOCK * BLOCKS:
            file.seek(0)
            digest.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.digest()


def media_key(media: Media) -> str:
    """The same text for the same image without reading a file: a path, a member of a file, or the digest of embedded bytes."""
    image = media.image if isinstance(media, ImageView) else media
    if isinstance(image, EmbeddedMedia):
        return hashlib.blake2b(image.data, digest_size=16).hexdigest() if image.data is not None else f"{image}@{image.offset}"
    return str(image)


def content_digest(media: Media) -> bytes:
    """The blake2b digest of a file's bytes, 16 bytes.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_media(media) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.digest()


def difference_hash(media: Media) -> np.ndarray[tuple[int], np.dtype[np.uint64]] | None:
    """The perceptual hash dHash of an image: for each of 16 x 16 cells, whether it is darker than its right neighbour.

    Resizing, another format and strong compression change few bits. The method is that of N. Krawetz, "Kind of like that"
    (hackerfactor.com, 2013), with 16 cells along an edge in place of 8.

    Returns:
        uint64 of shape (4,); None for a flat picture, whose hash would be close to that of any other.

    Raises:
        DataIssueError: the image cannot be opened.
    """
    grey = _small_grey(media) or open_image(media).convert("L")
    cells = np.asarray(grey.resize((HASH_EDGE + 1, HASH_EDGE), Image.Resampling.LANCZOS), dtype=np.int16)
    bits = cells[:, 1:] > cells[:, :-1]
    if not MIN_SET_BITS <= int(bits.sum()) <= HASH_BITS - MIN_SET_BITS:
        return None
    return np.packbits(bits).view(np.uint64)


def _small_grey(media: Media) -> Image.Image | None:
    """An upright JPEG image, decoded at an eighth to a half of its size; None for other images."""
    with open_image_header(media) as (image, orientation):
        if image.format != "JPEG" or orientation != 1 or image.mode not in ("L", "RGB"):
            return None
        image.draft("L", (8 * HASH_EDGE, 8 * HASH_EDGE))
        try:
            return image.convert("L")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataIssueError("image_damaged", f"cannot decode {media}: {error}") from error
