"""What one image file holds, from its header and its last bytes: nothing is decoded unless the file looks cut short.

JPEG, PNG, GIF and WebP say where they end, in an end marker or in a length, BMP and TIFF say where their pixels lie. So a
file of these that was cut short is known without decoding it. Damage in the middle, and the end of any other format, show
only when the image is decoded.
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

TAIL = 65_536  # bytes at the end in which an end marker is looked for: cameras and programs write their own after it
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
ENDS = {PNG_START[:3]: PNG_END, JPEG_START: JPEG_END, b"GIF": b";"}
JPEG_SCAN = 0xDA
TIFF_PLACES = ((273, 279), (324, 325))  # offsets and lengths of strips, of tiles
TIFF_BITS = 258
ELONGATED = 200  # aspect ratio from which image processors refuse an image
SIDEWAYS = 5  # EXIF orientations from here on exchange width and height


@dataclass(frozen=True)
class ImageReport:
    """What is known of one image.

    Attributes:
        size: width and height in pixels of the upright image; None for one that cannot be opened.
        issues: none for an ordinary image; one error for one that training could not open.
    """

    size: tuple[int, int] | None
    issues: ImageIssues


def inspect_image(media: Media, decode: bool = False) -> ImageReport:
    """What is wrong with an image, and what is worth knowing of it.

    Args:
        media: the image.
        decode: decode it whole even if it looks well, which finds all damage and takes many times longer.
    """
    try:
        with open_image_header(media) as (image, orientation):
            size = (image.height, image.width) if orientation >= SIDEWAYS else image.size
            try:
                cut = _cut(image)
                found = _traits(image, orientation)
            except DECODE_ERRORS as error:  # a tag of another type than the format has
                raise DataIssueError("image_unreadable", f"{media} has a damaged header: {error}") from error
    except DataIssueError as error:
        return ImageReport(None, [(_unopened(media, error.issue), str(error))])
    if cut or decode:
        try:
            open_image(media)
        except DataIssueError as error:
            found.append(("image_truncated" if cut else error.issue, str(error)))
        else:
            found += [("image_end_marker", f"{media} ends before its format says")] if cut else []
    return ImageReport(size, found)


def _traits(image: Image.Image, orientation: int) -> ImageIssues:
    found = []
    if max(image.size) > ELONGATED * min(image.size):
        found.append(("image_elongated", f"{image.width} x {image.height} pixels"))
    if orientation > 1:
        found.append(("image_rotated", f"EXIF orientation {orientation}"))
    elif image.format != "TIFF" and (damage := exif_damage(image)) is not None:
        found.append(("image_exif_damaged", f"damaged EXIF data may hide an orientation: {damage}"))
    shape = len(found)
    if image.mode in ("P", "PA"):
        found.append(("image_palette", f"{image.format} with a palette"))
    if image.has_transparency_data:
        found.append(("image_transparent", f"{image.format} with transparency"))
    if image.mode == "CMYK":
        found.append(("image_cmyk", f"{image.format} in CMYK"))
    if (bits := _bits(image)) > 8:
        found.append(("image_16bit", f"{image.format} with {bits} bits a channel"))
    if _has_several_frames(image):  # asked last: a damaged second frame leaves the image in an undefined state
        found.insert(shape, ("image_animated", "several pages" if image.format == "TIFF" else "several frames"))
    return found


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
        file.seek(24)  # IHDR's bit depth: Pillow opens 16 bits of RGB as RGB and does not say so
        return file.read(1)[0]
    if image.format == "TIFF":
        return max(image.tag_v2.get(TIFF_BITS, (8,)))  # type: ignore[attr-defined]
    if isinstance(image, DicomImage):
        return image.bits
    return 16 if image.mode.startswith("I") else 8


def _cut(image: Image.Image) -> bool:
    """Whether the file ends before its format says that it does."""
    file = _file(image)
    size = file.seek(0, io.SEEK_END)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        strips = [pair for places in TIFF_PLACES for pair in zip(*(tags.get(tag, ()) for tag in places), strict=False)]
        return any(not (isinstance(at, int) and isinstance(length, int)) or at + length > size for at, length in strips)
    if image.format == "BMP":
        tile = image.tile[0]  # type: ignore[attr-defined]
        raw = tile.codec_name == "raw"
        return bool(raw and tile.offset + tile.args[1] * image.height > size)
    return not _has_end(file, size)


def _file(image: Image.Image) -> BinaryIO:
    return cast(BinaryIO, image.fp)  # type: ignore[attr-defined]


def _has_end(file: BinaryIO, size: int) -> bool:
    """Whether a JPEG, PNG, GIF or WebP file has its end; True for any other."""
    file.seek(0)
    head = file.read(12)
    file.seek(max(0, size - len(PNG_END)))
    end = file.read(len(PNG_END))
    if end.endswith(ENDS.get(head[:3], ())):
        return True  # nearly every file; what follows is for those with something behind their end
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
    """Where the first scan of a JPEG begins: a thumbnail in its header has an end marker of its own."""
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


def _unopened(media: Media, issue: str) -> str:
    """A nearer name for a file that could not be opened as an image: it holds nothing, or its end is missing as well."""
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
