"""Media: where they may lie, and how an image is opened, the same everywhere.

A row names an image by a path, or carries it inside: a member of an archive, a column of bytes, a `data:` URI. `resolve_media`
turns each into a `Media`, a path that was checked or an `Embedded`; behind it nothing knows how the row said it.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import ExifTags, Image

from mmtune.data.fetch import fetch_media
from mmtune.data.findings import Unusable
from mmtune.files import user_cache

MAX_PIXELS = 89_478_485
"""Largest image that is opened: where Pillow warns of a decompression bomb."""

MAX_DATA_URI = 32 * 2**20
"""Longest `data:` URI that is decoded, in characters."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, by Pillow's names. Pillow knows more, among them formats that run another program."""

_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for bytes that are damaged or hostile. It parses in Python, so this is what parsers in Python raise."""

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the picture upright (CIPA DC-008, tag 0x0112); 1 and anything unknown is upright."""


@dataclass(frozen=True)
class Embedded:
    """A medium that lies inside another file.

    Attributes:
        container: the file that holds it.
        name: the member or column.
        offset: where its bytes begin in the container; None when they are in hand.
        length: how many bytes they are; None when they are in hand.
        data: the bytes in hand; None when they are a slice of the container.
    """

    container: Path
    name: str
    offset: int | None = None
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.container}!{self.name}"

    def open(self) -> BinaryIO:
        """The medium as a file that is read and sought in, and that nothing can lead out of.

        Raises:
            ValueError: for a slice that is not inside the container, or with neither bytes nor a slice.
            OSError: for a container that cannot be read.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.offset is None or self.length is None:
            raise ValueError(f"{self}: neither bytes nor a slice")
        file = self.container.open("rb")
        try:
            size = file.seek(0, io.SEEK_END)
            if not 0 <= self.offset <= self.offset + self.length <= size:
                raise ValueError(f"{self}: bytes {self.offset} to {self.offset + self.length} of a file of {size} bytes")
            return cast(BinaryIO, io.BufferedReader(_Slice(file, self.offset, self.length)))
        except BaseException:
            file.close()
            raise


class _Slice(io.RawIOBase):
    """A part of an open file as a file of its own; closing it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("sought before the beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


Media = Path | Embedded


def blank_image() -> Embedded:
    """A small black image in hand, where a picture is needed and none in particular."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return Embedded(Path("blank"), "blank.png", data=file.getvalue())


@dataclass(frozen=True)
class MediaRules:
    """What a source's rows may name.

    Attributes:
        root: where relative paths start, and what they may not lead out of.
        outside: whether files outside of `root` are allowed.
        urls: whether http and https URLs are fetched, within the limits of `fetch_media`.
        cache: where they are kept; None is `~/.cache/mmtune/media`.
    """

    root: Path
    outside: bool = False
    urls: bool = False
    cache: Path | None = None


def resolve_media(value: Any, rules: MediaRules) -> Media:
    """What a row says of a medium, as something that can be opened.

    Args:
        value: a path, a `data:` URI, bytes, an `Embedded`, or `{"bytes", "path"}` as `datasets` and parquet files have it.
        rules: what the row may name.

    Raises:
        ValueError: with the reason: no such file, outside the root with links followed, a URL where none are allowed, or a value
            that is none of these.
    """
    if isinstance(value, Embedded):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = {"bytes": value}
    if isinstance(value, dict) and value.get("bytes") is not None:
        data, path = value["bytes"], value.get("path")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise Unusable("media_path", f"'bytes' holds {type(data).__name__}, not bytes")
        return Embedded(rules.root, path if isinstance(path, str) and path else "bytes", data=bytes(data))
    name = value.get("path") if isinstance(value, dict) and set(value) <= {"bytes", "path"} else value
    if isinstance(name, Path):
        name = str(name)
    if not isinstance(name, str):
        raise Unusable("media_path", f"expected the path of an image or its bytes, found {_kind(value)}")
    if name[:5].lower() == "data:":
        return _from_data_uri(name, rules)
    if name[:8].lower().startswith(("http://", "https://")):
        if not rules.urls:
            raise Unusable("media_url", f"'{name[:100]}' is a URL; `allow_urls: true` in its source would fetch it")
        return fetch_media(name, rules.cache or user_cache("media"))
    return _from_path(name, rules)


def _kind(value: Any) -> str:
    return f"an object with {', '.join(map(str, value)) or 'nothing'}"[:200] if isinstance(value, dict) else type(value).__name__


def _from_path(name: str, rules: MediaRules) -> Path:
    root = rules.root.resolve()
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name; links in a circle; a null byte, a lone surrogate
        raise Unusable("media_path", f"cannot look up '{name[:200]}': {error}"[:400]) from error
    if not rules.outside and not path.is_relative_to(root):
        told = f"'{name}' lies outside media_root {root}; `allow_outside_root: true` in its source would allow it"
        raise Unusable("media_outside_root", told)
    if not is_file:
        raise Unusable("media_missing", f"no such file: {path}")
    return path


def _from_data_uri(uri: str, rules: MediaRules) -> Embedded:
    """RFC 2397, of an image and in base64, as rows in OpenAI's format carry images."""
    if len(uri) > MAX_DATA_URI:
        raise Unusable("media_path", f"a data: URI of {len(uri)} characters, more than {MAX_DATA_URI}")
    head, comma, body = uri.partition(",")
    kind, *parameters = head[5:].lower().split(";")
    if not comma or not kind.startswith("image/") or parameters[-1:] != ["base64"]:
        raise Unusable("media_path", f"'{uri[:60]}' is no data: URI of an image in base64 (data:image/png;base64,...)")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside of ASCII
        raise Unusable("media_path", f"'{uri[:60]}' is not valid base64: {error}") from error
    return Embedded(rules.root, "data: URI", data=data)


def image_size(media: Media | str) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from the file's header alone: what `open_image` will give.

    Raises:
        ValueError: for a file that is no image, has no pixels, or has too many.
    """
    with opened_image(media) as (image, orientation):
        width, height = image.size
        return (height, width) if orientation >= 5 else (width, height)


def open_image(media: Media | str) -> Image.Image:
    """The whole image, upright by its EXIF tag and in RGB.

    Transparency is dropped, 16 bits of grey become 8, an animation shows its first frame.

    Raises:
        ValueError: for a file that is no image, is cut short, has no pixels or too many.
    """
    with opened_image(media) as (image, orientation):
        try:
            image.load()
            made: Image.Image = image
            if made.mode.startswith("I"):
                made = _eight_bits(made)
            if made.mode == "P" and "transparency" in made.info:
                made = made.convert("RGBA")  # straight to RGB, Pillow warns for some palettes
            made = made.convert("RGB")
            return made.transpose(_TRANSPOSED[orientation]) if orientation in _TRANSPOSED else made
        except _DAMAGED as error:
            raise Unusable("image_damaged", f"cannot decode {media}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey as 8. Pillow's own conversion clips at 255."""
    wide = image.convert("I")  # the many forms of 16 bits become one
    low, high = cast(tuple[int, int], wide.getextrema())
    if low < 0 or high > 65_535:
        raise Unusable("image_unreadable", f"32-bit values from {low} to {high}; save it with 8 or 16 bits")
    return wide.point(lambda level: level / 256).convert("L")


@contextmanager
def opened_image(media: Media | str) -> Iterator[tuple[Image.Image, int]]:
    """An image whose header was read and found fit, with its EXIF orientation. Both files are closed at the end."""
    try:
        file = media.open() if isinstance(media, Embedded) else Path(media).open("rb")  # noqa: SIM115  (closed below)
    except (OSError, ValueError) as error:
        raise Unusable("image_unreadable", f"not an image that can be opened: {media}: {error}") from error
    with file:
        try:
            image = Image.open(file, formats=FORMATS)
            orientation = _orientation(image, file)
        except _DAMAGED as error:
            bomb = isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning))
            kind = "image_too_large" if bomb else "image_unreadable"
            reason = f"none of {', '.join(FORMATS)}" if isinstance(error, Image.UnidentifiedImageError) else error
            raise Unusable(kind, f"not an image that can be opened: {media}: {reason}") from error
        with image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                bound = f"more than {MAX_PIXELS}" if image.width * image.height else "which is none"
                kind = "image_too_large" if image.width * image.height else "image_zero_size"
                raise Unusable(kind, f"{media} has {image.width} x {image.height} pixels, {bound}")
            if image.mode.startswith("F"):
                told = f"{media} holds floating-point values, whose range nobody knows; save it with 8 or 16 bits"
                raise Unusable("image_unreadable", told)
            yield image, orientation


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8, without decoding."""
    if image.format == "TIFF":
        return 1  # Pillow gives the upright size and turns the pixels by itself
    if image.format == "PNG":
        found = _png_exif(file)
    else:
        found = image.getexif().get(ExifTags.Base.Orientation)
    return found if isinstance(found, int) and found in _TRANSPOSED else 1


def _png_exif(file: BinaryIO) -> Any:
    """A PNG may say its orientation behind its pixels, and Pillow decodes them to get there.

    So the chunks are walked, those that may say it are put together into a PNG without pixels, and Pillow reads that.
    """
    position = file.tell()
    file.seek(8)
    kept, told = b"\x89PNG\r\n\x1a\n", False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IHDR", b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            told = told or kind != b"IHDR"
            kept += head + file.read(length + 4)
        elif kind == b"IEND":
            break
        else:
            file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    if not told:
        return None
    no_pixels = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    with Image.open(io.BytesIO(kept + no_pixels), formats=["PNG"]) as bare:
        return Image.Image.getexif(bare).get(ExifTags.Base.Orientation)
