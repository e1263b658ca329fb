"""Inspection of an image file from its header and its last bytes; it is decoded only if it looks truncated.

JPEG, PNG, GIF and WebP have an end marker or a length, and BMP and TIFF the positions of their pixels, so that a truncated
file of these formats is detected without decoding. Damage in the middle, and truncation in other formats, are found only by
decoding.
"""

from __future__ import annotations

import contextlib
import io
import struct
from dataclasses import dataclass
from typing import BinaryIO, cast

from PIL import Image

from mmtune.data.media.dicom import DicomImage
from mmtune.data.media.media import DECODE_ERRORS, Media, exif_damage, open_image, open_image_header, open_media
from mmtune.data.validation.issues import DataIssueError

ImageIssues = list[tuple[str, str]]
"""Issues of one image: the issue type (a key of `ISSUE_TYPES`) and the detail."""

TAIL = 65_536  # bytes at the end that are searched for an end marker: cameras and programs append data of their own
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
ENDS = {PNG_START[:3]: PNG_END, JPEG_START: JPEG_END, b"GIF": b";"}
JPEG_SCAN = 0xDA
TIFF_OFFSETS_AND_LENGTHS = ((273, 279), (324, 325))  # offsets and lengths of strips, of tiles
TIFF_BITS = 258
ELONGATED = 200  # aspect ratio above which image processors reject an image
SIDEWAYS = 5  # EXIF orientations from 5 on swap width and height


@dataclass(frozen=True)
class ImageReport:
    """Size and issues of one image.

    Attributes:
        size: width and height in pixels of the upright image; None if it cannot be opened.
        issues: empty for an ordinary image; a single error if training could not open it.
    """

    size: tuple[int, int] | None
    issues: ImageIssues


def inspect_image(media: Media, decode: bool = False) -> ImageReport:
    """Inspect an image for errors, warnings and notes.

    Args:
        media: the image.
        decode: always decode it, which finds all damage and is many times slower.
    """
    try:
        with open_image_header(media) as (image, orientation):
            size = (image.height, image.width) if orientation >= SIDEWAYS else image.size
            try:
                issues = _header_issues(image, orientation)
                truncated = _looks_truncated(image)
            except DECODE_ERRORS as error:  # a tag has a wrong type
                raise DataIssueError("image_unreadable", f"{media}: the image header is damaged: {error}") from error
    except DataIssueError as error:
        return ImageReport(None, [(_refine_issue(media, error.issue), str(error))])
    if truncated or decode:
        try:
            open_image(media)
        except DataIssueError as error:
            issues.append(("image_truncated" if truncated else error.issue, str(error)))
        else:
            issues += [("image_end_marker", f"{media} has no end marker")] if truncated else []
    return ImageReport(size, issues)


def _header_issues(image: Image.Image, orientation: int) -> ImageIssues:
    issues = []
    if max(image.size) > ELONGATED * min(image.size):
        issues.append(("image_elongated", f"{image.width} x {image.height} pixels"))
    if orientation > 1:
        issues.append(("image_rotated", f"EXIF orientation {orientation}"))
    elif image.format != "TIFF" and (damage := exif_damage(image)) is not None:
        issues.append(("image_exif_damaged", f"damaged EXIF data; the orientation is unknown: {damage}"))
    shape = len(issues)
    if image.mode in ("P", "PA"):
        issues.append(("image_palette", f"{image.format} with a palette"))
    if image.has_transparency_data:
        issues.append(("image_transparent", f"{image.format} with transparency"))
    if image.mode == "CMYK":
        issues.append(("image_cmyk", f"{image.format} in CMYK"))
    if (bits := _bits(image)) > 8:
        issues.append(("image_16bit", f"{image.format} with {bits} bits per channel"))
    if _has_several_frames(image):  # checked last: a damaged second frame leaves the image in an undefined state
        issues.insert(shape, ("image_animated", "several pages" if image.format == "TIFF" else "several frames"))
    return issues


def _has_several_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a phone's photograph with its depth map or preview, not an animation
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:  # the second frame is damaged; training reads the first
        return True


def _bits(image: Image.Image) -> int:
    if image.format == "PNG":
        file = _file(image)
        file.seek(24)  # bit depth of IHDR: Pillow opens 16-bit RGB as RGB without notice
        return file.read(1)[0]
    if image.format == "TIFF":
        return max(image.tag_v2.get(TIFF_BITS, (8,)))  # type: ignore[attr-defined]
    if isinstance(image, DicomImage):
        return image.bits
    return 16 if image.mode.startswith("I") else 8


def _looks_truncated(image: Image.Image) -> bool:
    """Whether the file ends before the end that its format declares."""
    file = _file(image)
    size = file.seek(0, io.SEEK_END)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        strips = [
            pair
            for pair_tags in TIFF_OFFSETS_AND_LENGTHS
            for pair in zip(*(tags.get(tag, ()) for tag in pair_tags), strict=False)
        ]
        return any(not (isinstance(at, int) and isinstance(length, int)) or at + length > size for at, length in strips)
    if image.format == "BMP":
        tile = image.tile[0]  # type: ignore[attr-defined]
        raw = tile.codec_name == "raw"
        return bool(raw and tile.offset + tile.args[1] * image.height > size)
    return not _has_end(file, size)


def _file(image: Image.Image) -> BinaryIO:
    return cast(BinaryIO, image.fp)  # type: ignore[attr-defined]


def _has_end(file: BinaryIO, size: int) -> bool:
    """Whether a JPEG, PNG, GIF or WebP file is complete; True for other formats."""
    file.seek(0)
    head = file.read(12)
    file.seek(max(0, size - len(PNG_END)))
    end = file.read(len(PNG_END))
    if end.endswith(ENDS.get(head[:3], ())):
        return True  # nearly every file; the rest is for files with extra data after their end
    if head.startswith(JPEG_START):
        scan = _jpeg_scan(file)
        return scan is not None and JPEG_END in _tail(file, size, scan)
    if head.startswith(PNG_START):
        return PNG_END in _tail(file, size, 0)
    if head.startswith(b"GIF8"):
        return _tail(file, size, 0).rstrip(b"\0").endswith(b";")
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return int(struct.unpack("<I", head[4:8])[0]) + 8 <= size
    return True


def _jpeg_scan(file: BinaryIO) -> int | None:
    """Position of the first scan of a JPEG file, because a thumbnail in the header has its own end marker."""
    file.seek(2)
    while len(marker := file.read(4)) == 4 and marker[0] == 0xFF:
        if marker[1] == 0xFF:  # a fill byte
            file.seek(-3, io.SEEK_CUR)
        elif marker[1] == JPEG_SCAN:
            return file.tell()
        else:
            file.seek(max(0, int.from_bytes(marker[2:]) - 2), io.SEEK_CUR)
    return None


def _tail(file: BinaryIO, size: int, start: int) -> bytes:
    file.seek(max(start, size - TAIL))
    return file.read(TAIL)


def _refine_issue(media: Media, issue: str) -> str:
    """A more specific issue type for a file that could not be opened: empty, truncated, or without pixels."""
    if issue != "image_unreadable":
        return issue
    with (
        contextlib.suppress(OSError, ValueError),
        open_media(media) as file,
    ):
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            return "image_empty"
        if not _has_end(file, size):
            return "image_truncated"
        file.seek(0)
        head = file.read(24)
        if head.startswith(PNG_START) and not (any(head[16:20]) and any(head[20:24])):
            return "image_zero_size"
    return issue
